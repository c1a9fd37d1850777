"""From scores and a budget to the kept blocks, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection, pack_mask
from stem_attn.config import StemConfig


def select_top_blocks(
    scores: Tensor, budget: Tensor, grid: BlockGrid, config: StemConfig, kv_heads: int
) -> BlockSelection:
    """Keep the best-scored blocks of every row, sink and local blocks always.

    Args:
        scores: float32 [B, Hq, Qb, Kb]; overwritten.
        budget: int32 [Qb] or [B, Qb] on the CPU; blocks.
        grid: The geometry of the rows and columns.
        kv_heads: KV heads: each serves `Hq / kv_heads` consecutive query heads, a group.
        config: Reads `score`, `budget_scope`, `head_floor`, `sink_blocks`, `local_blocks` and `forced_blocks`.

    Returns:
        The selection. Equal scores go to the lower head, then to the lower index.
    """
    batch, heads = scores.shape[:2]
    keep, width = kept_per_row(budget, grid, config)
    least = kept_at_least(keep, grid, config).to(scores.device).view(-1, 1, grid.q_blocks, 1)
    keep = keep.to(scores.device).view(-1, 1, grid.q_blocks, 1)
    columns = torch.arange(grid.k_blocks, device=scores.device)
    diagonal = grid.block_ids(scores.device)[:, None]
    causal = columns <= diagonal
    forced = causal & ((columns < config.sink_blocks) | (columns > diagonal - config.local_blocks))
    scores.masked_fill_(~causal, -torch.inf)
    if config.budget_scope != "head":
        mask = _share(scores, keep, least, forced, kv_heads if config.budget_scope == "group" else 1, config)
        counts = mask.sum(-1, dtype=torch.int32)
        return BlockSelection(
            pack_mask(mask, counts, int(counts.max())), counts, grid.block_size, grid.q_len, grid.k_len
        )
    mask = _top_and_forced(scores, keep, forced, config)
    if config.forced_blocks == "on_top":
        counts = mask.sum(-1, dtype=torch.int32)
    else:
        counts = keep.view(-1, 1, grid.q_blocks).expand(batch, heads, -1)
    return BlockSelection(pack_mask(mask, counts, width), counts, grid.block_size, grid.q_len, grid.k_len)


def _top_and_forced(scores: Tensor, keep: Tensor, forced: Tensor, config: StemConfig) -> Tensor:
    """Mark what every head keeps of its own budget, forced blocks inside it or on top."""
    if config.forced_blocks == "on_top":
        return _top(scores, keep) | forced
    return _top(scores.masked_fill(forced, torch.inf), keep)


def _share(scores: Tensor, keep: Tensor, least: Tensor, forced: Tensor, scopes: int, config: StemConfig) -> Tensor:
    """Mark what heads keep that compete for the sum of their budgets.

    Args:
        scores: float32 [B, Hq, Qb, Kb], -inf in the future.
        keep: int32 [B or 1, 1, Qb, 1]; blocks that top-k takes for every head.
        least: int32, the same shape; blocks that every head keeps, forced ones among them.
        forced: bool [Qb, Kb].
        scopes: Sets of consecutive heads that compete among themselves.
        config: Reads `score` and `forced_blocks`.

    Returns:
        bool [B, Hq, Qb, Kb]. Every set keeps, row for row, as many blocks as its heads would alone.
    """
    batch, _, rows, blocks = scores.shape
    alone = _top_and_forced(scores, keep, forced, config).sum(-1, dtype=torch.int32)
    if config.score == "linear":  # logits of different heads do not compare, shares do
        scores = scores - scores.logsumexp(-1, keepdim=True)
    own = _top(scores.masked_fill(forced, torch.inf), least)
    rivals = scores.masked_fill(own, torch.inf).view(batch, scopes, -1, rows, blocks).transpose(2, 3)
    total = alone.view(batch, scopes, -1, rows).sum(2, dtype=torch.int32)
    mask = _top(rivals.flatten(3), total[..., None]).view(rivals.shape)
    return mask.transpose(2, 3).reshape(scores.shape)


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


def kept_at_least(keep: Tensor, grid: BlockGrid, config: StemConfig) -> Tensor:
    """Return what every head keeps of a row where heads share their budgets.

    Args:
        keep: int32 [Qb] or [B, Qb] on the CPU, from `kept_per_row`.
        grid: The geometry of the rows.
        config: Reads `head_floor`, `sink_blocks` and `local_blocks`.

    Returns:
        int32 in the shape of `keep`: the forced blocks, or `head_floor` of `keep` where that is more.
    """
    forced = (grid.block_ids().int() + 1).clamp(max=config.sink_blocks + config.local_blocks)
    return (keep.double() * config.head_floor).int().maximum(forced)


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
