"""From scores and a budget to the kept blocks, in plain torch on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection, pack_mask
from stem_attn.config import StemConfig
from stem_attn.workers import run_jobs

_LARGEST = torch.finfo(torch.float32).max


def select_top_blocks(
    scores: Tensor, budget: Tensor, grid: BlockGrid, config: StemConfig, kv_heads: int
) -> BlockSelection:
    """Keep the best-scored blocks of every row, sink and local blocks always.

    Args:
        scores: float32 [B, Hq, Qb, Kb].
        budget: int32 [Qb] or [B, Qb] on the CPU; blocks.
        grid: The geometry of the rows and columns.
        kv_heads: KV heads: each serves `Hq / kv_heads` consecutive query heads, a group.
        config: Reads `score`, `budget_scope`, `head_floor`, `sink_blocks`, `local_blocks` and `forced_blocks`.

    Returns:
        The selection. Equal scores go to the lower head, then to the lower index; a score that is NaN counts as the
        lowest of all.
    """

    def rows(sample: int, start: int, stop: int) -> Tensor:
        return scores[sample, :, start:stop]

    return select_rows(
        lambda: rows, grid.q_blocks, budget, grid, config, scores.shape[0], scores.shape[1], kv_heads, scores.device
    )


def select_rows(
    start_scores: Callable[[], Callable[[int, int, int], Tensor]],
    step: int,
    budget: Tensor,
    grid: BlockGrid,
    config: StemConfig,
    batch: int,
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> BlockSelection:
    """Do as `select_top_blocks` with scores that are made a few rows at a time, side by side on a CPU.

    Args:
        start_scores: Called once by every thread; returns what gives the scores of rows [start, stop) of a batch row,
            float32 [Hq, rows, Kb].
        step: Rows to ask for at once.
        budget: int32 [Qb] or [B, Qb] on the CPU; blocks.
        grid: The geometry of the rows and columns.
        config: As for `select_top_blocks`.
        batch: Batch rows.
        heads: Query heads.
        kv_heads: KV heads.
        device: Of the scores.
    """
    keep, most = kept_per_row(budget, grid, config)
    width = int(most.max())  # of the selection's indices: known on the host, so that a GPU need not be asked
    least = kept_at_least(keep, grid, config).expand(batch, -1)
    keep = keep.expand(batch, -1)
    # The last rows see the most: first.
    tiles = [(sample, max(stop - step, 0), stop) for stop in range(grid.q_blocks, 0, -step) for sample in range(batch)]
    counts = torch.empty(batch, heads, grid.q_blocks, dtype=torch.int32, device=device)
    packed: list[Tensor] = [counts] * len(tiles)  # each replaced by its tile's

    def run(number: int, score: Callable[[int, int, int], Tensor]) -> None:
        sample, start, stop = tiles[number]
        columns = torch.arange(grid.k_blocks, dtype=torch.int64, device=device)
        own = torch.arange(grid.first_block + start, grid.first_block + stop, dtype=torch.int64, device=device)[:, None]
        causal = columns <= own
        forced = causal & ((columns < config.sink_blocks) | (columns > own - config.local_blocks))
        keep_here, least_here = (x[sample, start:stop, None].to(device) for x in (keep, least))
        scores = score(sample, start, stop)
        mask = _kept(scores, keep_here, least_here, causal, forced, config, kv_heads)
        counts[sample, :, start:stop] = mask.sum(-1, dtype=torch.int32)
        bound = width
        if config.budget_scope != "head":
            bound = int(counts[sample, :, start:stop].max())
        packed[number] = pack_mask(mask, counts[sample, :, start:stop], bound)

    run_jobs(len(tiles), lambda: partial(run, score=start_scores()))
    widest = max(part.shape[-1] for part in packed)
    indices = torch.full((batch, heads, grid.q_blocks, widest), -1, dtype=torch.int32, device=device)
    for (sample, start, stop), part in zip(tiles, packed, strict=True):
        indices[sample, :, start:stop, : part.shape[-1]] = part
    return BlockSelection.made(indices, counts, grid)


def _kept(
    scores: Tensor, keep: Tensor, least: Tensor, causal: Tensor, forced: Tensor, config: StemConfig, kv_heads: int
) -> Tensor:
    """Mark what is kept of some rows of a batch row.

    Args:
        scores: float32 [Hq, rows, Kb].
        keep: int32 [rows, 1]; blocks that top-k takes for every head.
        least: int32 [rows, 1]; blocks that every head keeps of a shared budget, forced ones among them.
        causal: bool [rows, Kb].
        forced: bool [rows, Kb].
        config: As for `select_top_blocks`.
        kv_heads: KV heads.

    Returns:
        bool [Hq, rows, Kb].
    """
    mask = _top_and_forced(_ranks(scores, causal), keep, forced, config)
    if config.budget_scope == "head":
        return mask
    if config.score == "linear":  # logits of different heads do not compare, shares do
        logits = scores.nan_to_num(-torch.inf, _LARGEST, -torch.inf).masked_fill_(~causal, -torch.inf)
        scores = logits - logits.logsumexp(-1, keepdim=True)
    return _share(_ranks(scores, causal), least, forced, mask, config, kv_heads)


def _ranks(scores: Tensor, causal: Tensor) -> Tensor:
    """Make scores comparable: NaN and -inf the lowest number, +inf the largest, and -inf in the future alone."""
    return scores.nan_to_num(-_LARGEST, _LARGEST, -_LARGEST).masked_fill_(~causal, -torch.inf)


def _top_and_forced(scores: Tensor, keep: Tensor, forced: Tensor, config: StemConfig) -> Tensor:
    """Mark what every head keeps of its own budget, forced blocks inside it or on top."""
    if config.forced_blocks == "on_top":
        return _top(scores, keep) | forced
    return _top(scores.masked_fill(forced, torch.inf), keep)


def _share(scores: Tensor, least: Tensor, forced: Tensor, alone: Tensor, config: StemConfig, kv_heads: int) -> Tensor:
    """Mark what heads keep that compete for the sum of their budgets.

    Args:
        scores: float32 [Hq, rows, Kb], -inf in the future alone.
        least: int32 [rows, 1]; blocks that every head keeps, forced ones among them.
        forced: bool [rows, Kb].
        alone: bool [Hq, rows, Kb]; what the heads would keep of budgets of their own.
        config: Reads `budget_scope`.
        kv_heads: KV heads.

    Returns:
        bool [Hq, rows, Kb]. Every set keeps, row for row, as many blocks as its heads would alone.
    """
    rows, blocks = scores.shape[1:]
    scopes = kv_heads if config.budget_scope == "group" else 1  # sets of consecutive heads that compete
    own = _top(scores.masked_fill(forced, torch.inf), least)
    rivals = scores.masked_fill(own, torch.inf).view(scopes, -1, rows, blocks).transpose(1, 2)
    total = alone.sum(-1, dtype=torch.int32).view(scopes, -1, rows).sum(1, dtype=torch.int32)
    mask = _top(rivals.flatten(2), total[..., None]).view(rivals.shape)
    return mask.transpose(1, 2).reshape(scores.shape)


def kept_per_row(budget: Tensor, grid: BlockGrid, config: StemConfig) -> tuple[Tensor, Tensor]:
    """Clip a budget to what a row has, and bound the blocks that it keeps.

    Args:
        budget: int32 [Qb] or [B, Qb] on the CPU.
        grid: The geometry of the rows.
        config: Reads `sink_blocks`, `local_blocks` and `forced_blocks`.

    Returns:
        The blocks that top-k takes, int32 in the shape of `budget` (forced ones among them when they are inside),
        and those that a row keeps at most, from `most_kept`.
    """
    most = most_kept(budget, grid, config)
    keep = most if config.forced_blocks == "inside" else budget.minimum(most)
    return keep, most


def kept_at_least(keep: Tensor, grid: BlockGrid, config: StemConfig) -> Tensor:
    """Return what every head keeps of a row where heads share their budgets.

    Args:
        keep: int32 [Qb] or [B, Qb] on the CPU, from `kept_per_row`.
        grid: The geometry of the rows.
        config: Reads `head_floor`, `sink_blocks` and `local_blocks`.

    Returns:
        int32 in the shape of `keep`: the forced blocks, or `head_floor` of `keep` where that is more.
    """
    forced = (grid.block_ids(keep.device).int() + 1).clamp(max=config.sink_blocks + config.local_blocks)
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
    causal = torch.arange(grid.first_block + 1, grid.k_blocks + 1, dtype=torch.int32, device=budget.device)
    return most.minimum(causal)


def _top(scores: Tensor, keep: Tensor) -> Tensor:
    """Mark the `keep` largest scores of each row; equal ones in ascending order of index."""
    best = scores.topk(int(keep.max()), dim=-1).values
    cutoff = best.gather(-1, (keep.long() - 1).expand(*scores.shape[:-1], 1))
    above = scores > cutoff
    tied = scores == cutoff
    missing = keep - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= missing))
