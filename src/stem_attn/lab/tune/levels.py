"""The budgets that a layer can have at one prompt length, and how to share a total among layers."""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.config import StemConfig
from stem_attn.selection import most_kept

_HALVINGS = 100


@dataclass(frozen=True, slots=True)
class Level:
    """One budget of a layer.

    Args:
        scale: Factor on the config's budget.
        density: Kept over causal blocks; with blocks forced on top of the budget the most that may be kept.
    """

    scale: float
    density: float


def levels(config: StemConfig, length: int) -> list[Level]:
    """Return every budget that differs at a prompt length, of rising density; the last keeps everything.

    Args:
        config: Its schedule is scaled; `budget_scale` counts as 1.
        length: Tokens of the prompt.
    """
    grid = BlockGrid(length, length, config.block_size)
    n = grid.k_blocks
    start = dataclasses.replace(config, budget_scale=1.0).full_budget(n)
    if not start:  # nothing to scale
        return []
    # In the middle of a block, where rounding cannot reach the next one.
    scales = [(blocks + 0.5) / start for blocks in range(1, n)] + [(n + 0.5) / (config.decay * start)]
    found: dict[float, Level] = {}
    for scale in scales:
        scaled = dataclasses.replace(config, budget_scale=scale)
        kept = int(most_kept(budget_of(scaled, (length,)).rows(grid), grid, scaled).sum())
        density = kept / grid.causal_blocks
        found.setdefault(density, Level(scale, density))
    return list(found.values())


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` indices below `count`, the first and the last among them, closer together at the start."""
    if count <= most:
        return list(range(count))
    return sorted({round(count ** (i / (most - 1))) - 1 for i in range(most)})


def interpolate(errors: Sequence[float], at: Sequence[int], densities: Sequence[float]) -> Tensor:
    """Fill in a layer's squared error at every level from those at some.

    Args:
        errors: Squared relative errors at the levels `at`; the last may be 0.
        at: Ascending indices of levels, the first and the last level among them.
        densities: Of all levels.

    Returns:
        float64 [levels], never rising with the density.
    """
    falling = torch.tensor(errors, dtype=torch.float64).cummin(0).values
    filled = torch.empty(len(densities), dtype=torch.float64)
    x = torch.tensor(densities, dtype=torch.float64)
    for i, (low, high) in enumerate(itertools.pairwise(at)):
        below, above = falling[i], falling[i + 1]
        share = (x[low : high + 1] - x[low]) / (x[high] - x[low])
        if above > 0:  # errors fall about exponentially
            filled[low : high + 1] = below * (above / below) ** share
        else:
            filled[low : high + 1] = below + (above - below) * share
    return filled


def allocate(damage: Tensor, densities: Sequence[float], mean_density: float) -> list[int]:
    """Choose a level for every layer: the least total damage at a mean density, by a Lagrange multiplier.

    Every layer minimises damage + price * density at one price, so that the last block costs all layers alike.

    Args:
        damage: float64 [layers, levels]; what a layer's level costs in fidelity.
        densities: Of the levels, rising.
        mean_density: Not exceeded, unless no level is as low.

    Returns:
        Indices of levels, one a layer.
    """
    density = torch.tensor(densities, dtype=torch.float64)
    low, high = 0.0, float(damage.max()) / float(density.diff().min()) + 1.0  # at the high price all take the least
    chosen = torch.zeros(len(damage), dtype=torch.int64)
    for _ in range(_HALVINGS):
        price = (low + high) / 2 if not low else (low * high) ** 0.5
        picked = (damage + price * density).argmin(1)
        if float(density[picked].mean()) <= mean_density:
            chosen, high = picked, price
        else:
            low = price
    return [int(level) for level in chosen]


def follow(factors: Sequence[float], mean_density: float, steps: Sequence[Level]) -> list[int]:
    """Choose the levels of a schedule over layers: the most of it that does not exceed a mean density.

    Args:
        factors: What layers get of a budget, one each.
        mean_density: Not exceeded, unless no level is as low.
        steps: The levels, of rising density.

    Returns:
        Indices of levels, one a layer.
    """
    scales = [step.scale for step in steps]
    chosen, low, high = [0] * len(factors), 0.0, scales[-1] / min(factors)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        picked = [max(bisect_right(scales, middle * factor) - 1, 0) for factor in factors]
        if sum(steps[level].density for level in picked) <= mean_density * len(picked):
            chosen, low = picked, middle
        else:
            high = middle
    return chosen


def toward(chosen: Sequence[int], density: float, share: float, densities: Sequence[float]) -> list[int]:
    """Go part of the way from the same density in every layer to an allocation.

    Args:
        chosen: The allocation: indices of levels, one a layer.
        density: The same in every layer.
        share: 1 is the allocation itself.
        densities: Of the levels, rising.

    Returns:
        Indices of the levels that come closest.
    """
    at = torch.tensor(densities, dtype=torch.float64)
    wanted = (1 - share) * density + share * at[list(chosen)]
    return [int(level) for level in (at - wanted[:, None]).abs().argmin(1)]
