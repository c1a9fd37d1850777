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
from stem_attn.config import StemConfig
from stem_attn.lab.errors import InputError
from stem_attn.lab.intercept import Attend, intercept
from stem_attn.lab.logits import compare_positions, keep_hidden
from stem_attn.lab.progress import OnStep
from stem_attn.policy import PrefillPolicy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What sparse forwards gave, means over prompts.

    Args:
        density: Kept over causal blocks of the full attention layers that are not among `dense_layers`.
        kl_nats: KL(dense || sparse) of the next token, mean over positions.
        top1_agreement: Share of the positions where both predict the same token.
        densities: By layer.
    """

    density: float
    kl_nats: float
    top1_agreement: float
    densities: dict[int, float]


class Prompts:
    """Prompts with the dense model's hidden states.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T] each, all of one length.
        config: Its block size holds for every run.
        policy: Its `dense_layers` stay dense.
        logit_stride: Compare the predictions of every so many positions.
        curve: Configs whose attention error is measured in every layer, on the dense forward's q, k, v.
        on_step: Told what each forward is for.

    Attributes:
        count: How many there are.
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
        curve: Sequence[StemConfig],
        on_step: OnStep,
    ) -> None:
        self._model = model
        self._ids = [one.to(model.device) for one in ids]
        self.count = len(ids)
        self._stride, self._on_step = logit_stride, on_step
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

        self._hidden = []
        for number, one in enumerate(self._ids):
            on_step(f"dense forward {number + 1}/{len(self._ids)}")
            self._hidden.append(self._forward(one, observe))
        self.layers = sorted(measured)
        if not self.layers:
            raise InputError("no layer of this model is full causal attention, or all are in dense_layers")
        self.errors = {
            layer: torch.stack(found).double().mean(0)[:-1].tolist() for layer, found in sorted(measured.items())
        }

    @torch.inference_mode()
    def run(self, configs: Mapping[int, StemConfig], step: str, prompts: int | None = None) -> Outcome:
        """Run the model on prompts, each layer with its config; layers without one are dense.

        Args:
            configs: By layer.
            step: What the forwards are for, to tell.
            prompts: How many, the first ones; None: all.
        """
        kept: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            if layer not in configs:
                return self._dense_attention(q, k, v, scale)
            out, selection = stem_attention(q, k, v, config=configs[layer], scale=scale, return_selection=True)
            kept[layer].append(selection.counts.double().mean((0, 1)).sum() / self._grid.causal_blocks)
            return out

        kl, top1 = [], []
        for ids, dense in zip(self._ids[:prompts], self._hidden[:prompts], strict=True):
            self._on_step(step)
            numbers = compare_positions(self._model, dense, self._forward(ids, attend), ids, stride=self._stride)
            kl.append(numbers.mean_kl_nats)
            top1.append(numbers.top1_agreement)
        densities = {
            layer: float(torch.stack(found).mean()) if layer in configs else 1.0 for layer, found in kept.items()
        }
        return Outcome(fmean(densities.values()), fmean(kl), fmean(top1), densities)

    def _dense_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        everything = BlockSelection.everything(batch=1, heads=q.shape[1], grid=self._grid, device=q.device)
        return block_sparse_attention(q, k, v, everything, scale=scale)

    def _forward(self, ids: Tensor, attend: Attend) -> Any:
        """Return the last hidden states of a forward with a function in the place of full attention."""
        with intercept(self._model, attend), keep_hidden(self._model) as hidden:
            self._model(ids, use_cache=False, logits_to_keep=1)
        return hidden[0]
