"""Prompts on which budgets are tried: what the dense model makes of them, and sparse forwards against that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stem_attn.api import block_sparse_attention, stem_attention
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import budget_of
from stem_attn.config import StemConfig
from stem_attn.lab.answers import Prefilled, decode, force, read_prompt
from stem_attn.lab.errors import InputError
from stem_attn.lab.intercept import Attend, intercept
from stem_attn.lab.logits import compare_positions, keep_hidden
from stem_attn.lab.progress import OnStep
from stem_attn.policy import PrefillPolicy


@dataclass(frozen=True, slots=True)
class Answers:
    """What sparse prefills make of dense attention's answers, means over prompts.

    Args:
        drift_nats: What the answer's log-probability a token loses.
        agreement: Share of the prompts whose answer is the same.
    """

    drift_nats: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What sparse forwards gave, means over prompts.

    Args:
        density: Kept over causal blocks of the full attention layers that are not among `dense_layers`.
        kl_nats: KL(dense || sparse) of the next token, mean over positions.
        top1_agreement: Share of the positions where both predict the same token.
        densities: By layer.
        answers: Where prompts are answered.
    """

    density: float
    kl_nats: float
    top1_agreement: float
    densities: dict[int, float]
    answers: Answers | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """Dense attention's answer to a prompt, and its own mean log-probability a token."""

    ids: list[int]
    log_probability: float


class Prompts:
    """Prompts with the dense model's hidden states, and its answers where they are asked for.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T] each, all of one length.
        config: Its block size holds for every run.
        policy: Its `dense_layers` stay dense.
        logit_stride: Compare the predictions of every so many positions.
        answer_tokens: Most tokens of the dense model's answer to each prompt; 0: prompts are not answered.
        curve: Configs whose attention error is measured in every layer, on the dense forward's q, k, v.
        on_step: Told what each forward is for.

    Attributes:
        count: How many there are.
        answered: Whether every prompt has an answer.
        layer_count: Layers of the model.
        layers: Indices of the full attention layers that are not among `dense_layers`.
        errors: By layer, squared relative attention errors of `curve`, means over prompts: |O_s - O|^2 / |O|^2.

    Raises:
        InputError: There is no such layer.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        ids: Sequence[Tensor],
        config: StemConfig,
        policy: PrefillPolicy,
        *,
        logit_stride: int,
        answer_tokens: int,
        curve: Sequence[StemConfig],
        on_step: OnStep,
    ) -> None:
        self._model = model
        self._ids = [one.to(model.device) for one in ids]
        self.count = len(ids)
        self._stride, self._on_step = logit_stride, on_step
        self.answered = answer_tokens > 0
        self._known: dict[tuple[int, frozenset[tuple[int, StemConfig]]], Outcome] = {}  # by prompt and configs
        self._grid = BlockGrid(ids[0].shape[1], ids[0].shape[1], config.block_size)
        self.layer_count = model.config.get_text_config().num_hidden_layers
        measured: dict[int, list[Tensor]] = {}  # by layer, a tensor a prompt

        def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            exact = self._dense_attention(q, k, v, scale)
            if not policy.is_dense_layer(layer, self.layer_count):
                tried = (stem_attention(q, k, v, config=one, scale=scale) for one in curve)
                lost = [(out.float() - exact.float()).square().sum() for out in tried]
                power = exact.float().square().sum()
                measured.setdefault(layer, []).append(torch.stack([*lost, power]) / power)
            return exact

        self._hidden, self._answers = [], []
        for number, one in enumerate(self._ids):
            on_step(f"dense forward {number + 1}/{len(self._ids)}")
            hidden, read = self._forward(one, observe)
            self._hidden.append(hidden)
            if read is not None:
                (answer,) = decode(model, read, answer_tokens)
                (forced,) = force(model, read, answer)
                self._answers.append(_Answer(answer, forced.log_probability))
        self.layers = sorted(measured)
        if not self.layers:
            raise InputError("no layer of this model is full causal attention, or all are in dense_layers")
        self.errors = {
            layer: torch.stack(found).double().mean(0)[:-1].tolist() for layer, found in sorted(measured.items())
        }

    def run(self, configs: Mapping[int, StemConfig], step: str, prompts: int | None = None) -> Outcome:
        """Run the model on prompts, each layer with its config; layers without one are dense.

        Args:
            configs: By layer.
            step: What the forwards are for, to tell.
            prompts: How many, the first ones; None: all.
        """
        one_each: list[Outcome] = []
        for number in range(self.count if prompts is None else prompts):
            key = number, frozenset(configs.items())
            if key not in self._known:
                self._on_step(step)
                self._known[key] = self._run_one(number, configs)
            one_each.append(self._known[key])
        return _mean(one_each)

    @torch.inference_mode()
    def _run_one(self, number: int, configs: Mapping[int, StemConfig]) -> Outcome:
        """Run the model on one prompt."""
        kept: dict[int, Tensor] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            if layer not in configs:
                return self._dense_attention(q, k, v, scale)
            out, selection = stem_attention(q, k, v, config=configs[layer], scale=scale, return_selection=True)
            kept[layer] = selection.counts.double().mean((0, 1)).sum() / self._grid.causal_blocks
            return out

        ids, answers = self._ids[number], None
        hidden, read = self._forward(ids, attend)
        numbers = compare_positions(self._model, self._hidden[number], hidden, ids, stride=self._stride)
        if read is not None:
            dense = self._answers[number]
            (forced,) = force(self._model, read, dense.ids)
            answers = Answers(dense.log_probability - forced.log_probability, float(forced.own))
        densities = {layer: float(kept[layer]) if layer in kept else 1.0 for layer in self.layers}
        return Outcome(fmean(densities.values()), numbers.mean_kl_nats, numbers.top1_agreement, densities, answers)

    def keeping_everything(self) -> Outcome:
        """Return what dense attention gives, without a forward."""
        exact = Answers(0.0, 1.0) if self.answered else None
        return Outcome(1.0, 0.0, 1.0, dict.fromkeys(self.layers, 1.0), exact)

    def budget(self, config: StemConfig) -> Tensor:
        """Return the blocks that every query block may keep with a config."""
        return budget_of(config, (self._grid.k_len,)).blocks

    def _dense_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        everything = BlockSelection.everything(batch=1, heads=q.shape[1], grid=self._grid, device=q.device)
        return block_sparse_attention(q, k, v, everything, scale=scale)

    def _forward(self, ids: Tensor, attend: Attend) -> tuple[Any, Prefilled | None]:
        """Run the model with a function in the place of full attention.

        Returns:
            The last hidden states; and what an answer follows, where prompts are answered.
        """
        read = None
        with intercept(self._model, attend), keep_hidden(self._model) as hidden:
            if self.answered:
                read = read_prompt(self._model, ids)
            else:
                self._model(ids, use_cache=False, logits_to_keep=1)
        return hidden[0], read


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean over prompts."""
    answers = [one.answers for one in outcomes if one.answers is not None]
    return Outcome(
        fmean(one.density for one in outcomes),
        fmean(one.kl_nats for one in outcomes),
        fmean(one.top1_agreement for one in outcomes),
        {layer: fmean(one.densities[layer] for one in outcomes) for layer in outcomes[0].densities},
        Answers(fmean(one.drift_nats for one in answers), fmean(one.agreement for one in answers)) if answers else None,
    )
