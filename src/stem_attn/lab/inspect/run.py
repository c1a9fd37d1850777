"""Run a prompt through a model and look at every layer: what methods keep, and where the attention really falls.

Blocks and their attention mass are taken on the q, k, v of one dense forward, so that methods choose from the same
inputs. Whether it mattered is taken from a forward of each method in which every layer is as the method has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.checks import resolve_scale
from stem_attn.lab.devices import synchronize
from stem_attn.lab.equal_density import Choice, select_at_density
from stem_attn.lab.errors import InputError
from stem_attn.lab.intercept import intercept
from stem_attn.lab.logits import compare_positions, keep_hidden
from stem_attn.lab.named_methods import NamedMethod
from stem_attn.lab.progress import OnStep
from stem_attn.lab.timing import Work, first_call
from stem_attn.methods.dense import Dense
from stem_attn.methods.estimates import attention_mass
from stem_attn.plots import strength

STEPS = 15
"""Attention mass is kept in steps from 0 to this many: four bits a block."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What one method keeps of one layer.

    Args:
        blocks: bool [H, R, Kb] on the CPU; the kept blocks of the rows that are shown.
        lost: float32 [H, R] on the CPU; the share of the attention of each of these rows on pruned blocks.
        density: Kept over causal blocks of every head, all rows.
        error: Frobenius |O_s - O| / |O| over all heads and tokens.
    """

    blocks: Tensor
    lost: Tensor
    density: list[float]
    error: float

    @property
    def lost_by_head(self) -> list[float]:
        """Mean over the rows that are shown."""
        means: list[float] = self.lost.double().mean(1).tolist()
        return means


@dataclass(frozen=True, slots=True)
class Layer:
    """One full attention layer.

    Args:
        index: In the model.
        mass: uint8 [H, R, Kb] on the CPU; `plots.strength` of each block's attention in `STEPS` steps.
        kept: One a method.
        dense_seconds: One call of dense attention.
    """

    index: int
    mass: Tensor
    kept: list[Kept]
    dense_seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model makes of the prompt with a method in every layer.

    Args:
        density: Kept over causal blocks, all measured layers together.
        sparse_layers: Layers that the method decided about.
        top1_agreement: Share of positions with the dense model's most likely next token.
        mean_kl_nats: Mean KL(dense || method) over the positions.
        forward_seconds: The whole forward.
        selection_seconds: Choosing blocks, by layer.
        attention_seconds: Attending over them, by layer.
    """

    density: float
    sparse_layers: int
    top1_agreement: float
    mean_kl_nats: float
    forward_seconds: float
    selection_seconds: dict[int, float]
    attention_seconds: dict[int, float]

    @property
    def rest_seconds(self) -> float:
        """The forward without attention and selection."""
        return self.forward_seconds - sum(self.selection_seconds.values()) - sum(self.attention_seconds.values())


@dataclass(slots=True)
class Found:
    """A prompt as a model with methods sees it.

    Args:
        grid: The blocks.
        rows: Absolute query blocks that are shown, ascending.
        layers: Full attention layers in order.
        outcomes: One a method.
        other_calls: Attention calls that are not full causal attention, by reason; they stay exact.
    """

    grid: BlockGrid
    rows: list[int]
    layers: list[Layer] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    other_calls: dict[str, int] = field(default_factory=dict)


@torch.inference_mode()
def look(
    model: Any,
    ids: Tensor,
    methods: Sequence[NamedMethod],
    *,
    block_size: int,
    rows: Sequence[int],
    on_step: OnStep,
) -> Found:
    """Look at a prompt.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T].
        methods: What to look at.
        block_size: Tokens a block, of every method.
        rows: Absolute query blocks to show, ascending.
        on_step: Told what starts: every layer of the dense forward, and of the forward of every method.

    Raises:
        InputError: The model has no full attention layer.
    """
    ids = ids.to(model.device)
    found = Found(BlockGrid(ids.shape[1], ids.shape[1], block_size), list(rows))
    layers = model.config.get_text_config().num_hidden_layers

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        on_step(f"dense, layer {layer}")
        scale = resolve_scale(scale, q.shape[3])
        if not found.layers:
            _dense(q, k, v, scale)  # the first call of a process is slower than all others
        out: Tensor
        out, seconds = _timed(lambda: _dense(q, k, v, scale), q.device)
        mass = _mass(q, k, found.grid, found.rows, scale)
        choices = [_choose(named, block_size, layer, layers, q, k, v, scale) for named in methods]
        kept = [_kept(choice, mass, found.rows, q, k, v, scale, out) for choice in choices]
        steps = (strength(mass) * STEPS).round().to(torch.uint8).cpu()
        found.layers.append(Layer(layer, steps, kept, seconds))
        return out

    with intercept(model, observe) as others, keep_hidden(model) as hidden:
        model(ids, use_cache=False, logits_to_keep=1)
    found.other_calls = dict(others)
    if not found.layers:
        raise InputError(f"no layer of this model is full causal attention: {found.other_calls}")
    for named in methods:
        found.outcomes.append(_outcome(model, ids, named, block_size, layers, hidden[0], on_step))
    return found


def _outcome(
    model: Any, ids: Tensor, named: NamedMethod, block_size: int, layers: int, dense: Any, on_step: OnStep
) -> Outcome:
    selection_seconds: dict[int, float] = {}
    attention_seconds: dict[int, float] = {}
    kept, causal = 0, 0

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        nonlocal kept, causal
        on_step(f"{named.name}, layer {layer}")
        choice, selecting = _timed(lambda: _choose(named, block_size, layer, layers, q, k, v, scale), q.device)
        out: Tensor
        out, attending = _timed(lambda: choice.attend(q, k, v, scale), q.device)
        selection_seconds[layer], attention_seconds[layer] = selecting, attending
        kept += int(choice.selection.counts.sum())
        causal += q.shape[1] * choice.selection.grid.causal_blocks
        return out

    with intercept(model, attend), keep_hidden(model) as hidden:
        _, seconds = _timed(lambda: model(ids, use_cache=False, logits_to_keep=1), ids.device)
    numbers = compare_positions(model, dense, hidden[0], ids)
    return Outcome(
        density=kept / causal,
        sparse_layers=sum(not named.policy.is_dense_layer(layer, layers) for layer in attention_seconds),
        top1_agreement=numbers.top1_agreement,
        mean_kl_nats=numbers.mean_kl_nats,
        forward_seconds=seconds,
        selection_seconds=selection_seconds,
        attention_seconds=attention_seconds,
    )


def _choose(
    named: NamedMethod, block_size: int, layer: int, layers: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> Choice:
    """Select as an adapter would: everything in layers that the policy leaves dense."""
    if named.policy.is_dense_layer(layer, layers):
        dense = Dense(block_size=block_size)
        return Choice(dense, dense.select(q, k, v, scale=scale))
    return select_at_density(named, block_size, None, q, k, v, scale, layer=layer, layers=layers)[0]


def _kept(
    choice: Choice, mass: Tensor, rows: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float, dense: Tensor
) -> Kept:
    """Compare a choice with the true attention."""
    selection: BlockSelection = choice.selection
    blocks = selection.to_mask()[0, :, rows]
    off = choice.attend(q, k, v, scale).float() - dense.float()
    return Kept(
        blocks=blocks.cpu(),
        lost=(mass * ~blocks).sum(-1).cpu(),
        density=(selection.counts[0].sum(-1, dtype=torch.float64) / selection.grid.causal_blocks).tolist(),
        error=float(off.norm() / dense.float().norm()),
    )


def _mass(q: Tensor, k: Tensor, grid: BlockGrid, rows: list[int], scale: float) -> Tensor:
    """Return the exact attention of some query blocks on every key block: float32 [H, R, Kb]."""
    if len(rows) == grid.q_blocks:
        return attention_mass(q, k, grid, scale)[0]
    mass = torch.zeros(q.shape[1], len(rows), grid.k_blocks, dtype=torch.float32, device=q.device)
    for place, row in enumerate(rows):
        start, stop = grid.q_span(row)
        own = BlockGrid(stop - start, stop, grid.block_size)  # these queries are the last of the keys that they see
        mass[:, place, : own.k_blocks] = attention_mass(q[:, :, start:stop], k[:, :, :stop], own, scale)[0, :, 0]
    return mass


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _timed(work: Work, device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    return first_call(work, device)
