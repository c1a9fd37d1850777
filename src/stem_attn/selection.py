"""From scores and a budget to the kept blocks, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection, pack_mask
from stem_attn.config import StemConfig


def select_top_blocks(scores: Tensor, budget: Tensor, grid: BlockGrid, config: StemConfig) -> BlockSelection:
    """Keep the best-scored blocks of every row, sink and local blocks always.

    Args:
        scores: float32 [B, Hq, Qb, Kb]; overwritten.
        budget: int32 [Qb] or [B, Qb] on the CPU; blocks.
        grid: The geometry of the rows and columns.
        config: Reads `sink_blocks`, `local_blocks` and `forced_blocks`.

    Returns:
        The selection. Equal scores go to the lower index.
    """
    batch, heads = scores.shape[:2]
    keep, width = kept_per_row(budget, grid, config)
    keep = keep.to(scores.device).view(-1, 1, grid.q_blocks, 1)
    columns = torch.arange(grid.k_blocks, device=scores.device)
    diagonal = grid.block_ids(scores.device)[:, None]
    causal = columns <= diagonal
    forced = causal & ((columns < config.sink_blocks) | (columns > diagonal - config.local_blocks))
    scores.masked_fill_(~causal, -torch.inf)
    if config.forced_blocks == "inside":
        scores.masked_fill_(forced, torch.inf)
    mask = _top(scores, keep)
    if config.forced_blocks == "on_top":
        mask |= forced
        counts = mask.sum(-1, dtype=torch.int32)
    else:
        counts = keep.view(-1, 1, grid.q_blocks).expand(batch, heads, -1)
    return BlockSelection(pack_mask(mask, counts, width), counts, grid.block_size, grid.q_len, grid.k_len)


def kept_per_row(budget: Tensor, grid: BlockGrid, config: StemConfig) -> tuple[Tensor, int]:
    """Clip a budget to what a row has, and bound the blocks that any row keeps.

    Args:
        budget: int32 [Qb] or [B, Qb] on the CPU.
        grid: The geometry of the rows.
        config: Reads `sink_blocks`, `local_blocks` and `forced_blocks`.

    Returns:
        The blocks that top-k takes, int32 in the shape of `budget` (forced ones among them when they are inside),
        and the width of the selection's `indices`: known on the host, so that a GPU need not be asked.
    """
    most = most_kept(budget, grid, config)
    keep = most if config.forced_blocks == "inside" else budget.minimum(most)
    return keep, int(most.max())


def most_kept(budget: Tensor, grid: BlockGrid, config: StemConfig) -> Tensor:
    """Bound the blocks that every row keeps, forced ones included: exactly, where these are inside the budget.

    Args:
        budget: int32 [Qb] or [B, Qb] on the CPU.
        grid: The geometry of the rows.
        config: Reads `sink_blocks`, `local_blocks` and `forced_blocks`.

    Returns:
        int32 in the shape of `budget`; blocks.
    """
    forced = config.sink_blocks + config.local_blocks
    most = budget.clamp(min=forced) if config.forced_blocks == "inside" else budget + forced
    return most.minimum(grid.block_ids().int() + 1)


def _top(scores: Tensor, keep: Tensor) -> Tensor:
    """Mark the `keep` largest scores of each row; equal ones in ascending order of index."""
    best = scores.topk(int(keep.max()), dim=-1).values
    cutoff = best.gather(-1, (keep.long() - 1).expand(*scores.shape[:3], 1))
    above = scores > cutoff
    tied = scores == cutoff
    missing = keep - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= missing))
