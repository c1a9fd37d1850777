"""From estimates to kept blocks: orders, coverage and patterns, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid


def causal_blocks(grid: BlockGrid, device: torch.device) -> Tensor:
    """Mark the blocks that are not wholly in the future of their row: bool [Qb, Kb]."""
    return torch.arange(grid.k_blocks, device=device) <= grid.block_ids(device)[:, None]


def forced_blocks(grid: BlockGrid, sink_blocks: int, local_blocks: int, device: torch.device) -> Tensor:
    """Mark the first blocks, and the last ones up to the diagonal: bool [Qb, Kb]."""
    columns = torch.arange(grid.k_blocks, device=device)
    diagonal = grid.block_ids(device)[:, None]
    return (columns <= diagonal) & ((columns < sink_blocks) | (columns > diagonal - local_blocks))


def rank(scores: Tensor) -> Tensor:
    """Number the entries of the last dimension from the largest, 0, down; equal ones in ascending order of index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    numbers = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, numbers)


def covered_before(mass: Tensor, first: Tensor | None = None) -> Tensor:
    """Tell how much of the total is covered before each entry's turn, when entries are taken from the largest down.

    The fewest entries that cover a share p are those for which this is below p.

    Args:
        mass: [..., n], not negative.
        first: bool, broadcastable to `mass`: entries whose turn comes before all others'.

    Returns:
        Shares of the last dimension's total, in the shape of `mass`, from 0; above 1 where nothing is left to cover.
    """
    keys = mass if first is None else mass.masked_fill(first, torch.inf)
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices
    taken = mass.gather(-1, order)
    before = (taken.cumsum(-1) - taken) / taken.sum(-1, keepdim=True)
    before = before.masked_fill_(taken == 0, 2.0)  # rounding must not decide about entries without mass
    shares = torch.empty_like(mass).scatter_(-1, order, before)
    return shares if first is None else shares.masked_fill_(first, -1.0)


def best_share(scores: Tensor, grid: BlockGrid, density: float, scope: str) -> Tensor:
    """Keep the best-scored blocks, as many as make the density exact.

    Args:
        scores: float [B, Hq, Qb, Kb].
        grid: The rows and columns.
        density: Kept over causal blocks.
        scope: Which blocks compete: those of a `"head"`, or of all heads of a batch row, `"layer"`.

    Returns:
        bool [B, Hq, Qb, Kb]. Diagonal blocks are kept, inside the total; equal scores go to the lower index.
    """
    causal = causal_blocks(grid, scores.device)
    diagonal = forced_blocks(grid, 0, 1, scores.device)
    scores = scores.masked_fill(~causal, -torch.inf).masked_fill_(diagonal, torch.inf)
    start = {"layer": 1, "head": 2}[scope]
    competing = causal.expand_as(scores).flatten(start).sum(-1, keepdim=True)
    total = (competing * density).round()
    return (rank(scores.flatten(start)) < total).view_as(scores)


def vertical_slash_blocks(vertical: Tensor, slash: Tensor, grid: BlockGrid) -> Tensor:
    """Keep whole columns and whole diagonals of blocks.

    Args:
        vertical: bool [B, Hq, Kb]; key blocks that all rows keep.
        slash: bool [B, Hq, Kb]; distances, in blocks, from a row's diagonal block back to one that it keeps.
        grid: The rows and columns.

    Returns:
        bool [B, Hq, Qb, Kb]; what lies in the future is undefined.
    """
    distance = grid.block_ids(slash.device)[:, None] - torch.arange(grid.k_blocks, device=slash.device)
    return vertical[:, :, None] | slash[:, :, distance.clamp(min=0)]
