"""Bring methods to the same density on the same q, k, v: the same cost for attention, whatever the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stem_attn.api import block_sparse_attention
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import budget_of
from stem_attn.config import StemConfig
from stem_attn.lab.named_methods import NamedMethod
from stem_attn.method import Method
from stem_attn.methods import Stem
from stem_attn.methods.knob import first_rows_keep, match_density
from stem_attn.methods.uniform import Uniform
from stem_attn.selection import most_kept

_TOLERANCE = 0.0002  # of density, for knobs that are not whole numbers of blocks


class UnreachableDensityError(ValueError):
    """A method cannot keep so little, or so much, of these inputs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A method and what it selects for one layer's q, k, v."""

    method: Method
    selection: BlockSelection

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Compute the attention output, [B, Hq, T, Dv]: over what is kept, and what stands for the rest."""
        method = self.method.method if isinstance(self.method, SomeRows) else self.method
        config = method.config if isinstance(method, Stem | Uniform) else StemConfig()
        residual, precision = config.residual, config.precision
        return block_sparse_attention(q, k, v, self.selection, scale=scale, residual=residual, precision=precision)


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Let a method decide about some query rows of a prompt; the others keep everything.

    Args:
        method: Decides about the rows.
        first: Where they start, as a share of the rows.
        last: Where they end.
    """

    method: Method
    first: float
    last: float

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.method.block_size

    def select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        prompt_len: int | Sequence[int] | Tensor | None = None,
    ) -> BlockSelection:
        """See `stem_attn.method.Method.select`."""
        chosen = self.method.select(q, k, v, scale=scale, prompt_len=prompt_len)
        mask, rows = chosen.to_mask(), chosen.grid.block_ids(q.device)
        first, last = (round(share * chosen.grid.k_blocks) for share in (self.first, self.last))
        causal = torch.arange(chosen.grid.k_blocks, device=q.device) <= rows[:, None]
        mask |= causal & ((rows < first) | (rows >= last))[:, None]
        return BlockSelection.from_mask(mask, block_size=chosen.block_size, q_len=chosen.q_len, k_len=chosen.k_len)


def select_at_density(
    named: NamedMethod,
    block_size: int,
    density: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    *,
    layer: int | None = None,
    layers: int = 0,
) -> tuple[Choice, ...]:
    """Select with a method at a density.

    Stem's budget is a whole number of blocks, so its choices come in steps: where none has the density itself, the
    two neighbours that enclose it are returned.

    Args:
        named: The method.
        block_size: Tokens a block.
        density: Kept over causal blocks, forced ones included; None: whatever the settings give.
        q: [B, Hq, T, D].
        k: [B, Hkv, T, D].
        v: [B, Hkv, T, Dv].
        scale: Factor of the logits, or None for 1 / sqrt(D).
        layer: The layer's index in the model, for budgets by layer.
        layers: Of the model.

    Returns:
        One choice, or two of rising density.

    Raises:
        UnreachableDensityError: The method cannot keep so little or so much.
    """
    method = named.build(block_size)
    config = _schedule(method)
    if density is None:
        if layer is not None and isinstance(method, Stem):
            method = Stem(named.policy.layer_config(method.config, layer, layers))
        chosen: Method = method if named.rows == (0.0, 1.0) else SomeRows(method, *named.rows)
        return (Choice(chosen, chosen.select(q, k, v, scale=scale)),)
    if config is None:
        try:
            matched = match_density(method, q, k, v, density, scale=scale, tolerance=_TOLERANCE)
        except ValueError as error:
            raise UnreachableDensityError(str(error)) from error
        return (Choice(matched, matched.select(q, k, v, scale=scale)),)

    def at(blocks: int) -> Choice:
        stem: Method = Stem(first_rows_keep(config, blocks))
        if named.rows != (0.0, 1.0):
            stem = SomeRows(stem, *named.rows)
        return Choice(stem, stem.select(q, k, v, scale=scale))

    grid = BlockGrid(q.shape[2], k.shape[2], block_size)
    low, high = (1, grid.k_blocks) if named.rows != (0.0, 1.0) else enclosing_budgets(config, grid, density)
    return _enclose(named.name, at, low, high, density)


def share_above(below: float, above: float, wanted: float) -> float:
    """Return the weight from 0 to 1 of the upper of two densities in a linear interpolation."""
    return 0.0 if above == below else min(max((wanted - below) / (above - below), 0.0), 1.0)


def mix(below: Any, above: Any, weight: float) -> Any:
    """Interpolate two numbers, or two lists of numbers element by element."""
    if isinstance(below, float):
        return below + weight * (above - below)
    return [mix(low, high, weight) for low, high in zip(below, above, strict=True)]


@lru_cache(maxsize=1024)  # every layer asks for the same
def enclosing_budgets(config: StemConfig, grid: BlockGrid, density: float) -> tuple[int, int]:
    """Bound the budget of the first rows that gives a density, without looking at any scores.

    Returns:
        The largest number of blocks that surely keeps at most the density (or 1), and the smallest that surely keeps
        at least as much (or all blocks). They are neighbours where forced blocks lie inside the budget.
    """

    def share(kept: Tensor) -> float:
        return int(kept.sum()) / grid.causal_blocks

    low, high = 1, grid.k_blocks
    for blocks in range(1, grid.k_blocks + 1):
        rescaled = first_rows_keep(config, blocks)
        budget = budget_of(rescaled, (grid.k_len,)).rows(grid)
        if share(most_kept(budget, grid, rescaled)) <= density:
            low = blocks
        # Blocks forced on top of the budget may all be among its choices.
        if share(most_kept(budget, grid, dataclasses.replace(rescaled, forced_blocks="inside"))) >= density:
            high = blocks
            break
    return low, max(low, high)


def _schedule(method: Method) -> StemConfig | None:
    """Return the config whose budget is rescaled to reach a density; None for methods with a knob of their own."""
    if isinstance(method, Stem):
        return method.config
    if isinstance(method, Uniform):
        return dataclasses.replace(method.config, decay=1.0, tail_blocks=0)
    return None


def _enclose(name: str, at: Callable[[int], Choice], low: int, high: int, density: float) -> tuple[Choice, ...]:
    """Find the neighbouring budgets whose densities enclose the wanted one."""
    ends = {low: at(low), high: at(high)}
    least = ends[low].selection.density()
    if least > density:
        raise UnreachableDensityError(f"{name} keeps at least {least:.4f} of the causal blocks, not {density:g}")
    while high - low > 1:
        middle = (low + high) // 2
        ends[middle] = at(middle)
        if ends[middle].selection.density() <= density:
            low = middle
        else:
            high = middle
    below, above = ends[low], ends[high]
    return (below,) if below.selection.density() == density or low == high else (below, above)
