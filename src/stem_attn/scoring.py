"""The Output-Aware Metric: a score for every (query block, key block) pair.

The linear routing logit is the mean, over a block pair, of antidiagonal dot products with a stride. That mean is linear
in q and in k, so it factorises: average the tokens of a block by their position modulo the stride, pair query group
g with key group `stride - 1 - g`, and the score is one dot product of length `stride * D`. Scoring therefore reads
q, k and v once and multiplies matrices of `n` rows.

The mass estimate is a softmax over means of short runs of tokens. It is made tile by tile, so that nothing of size
`(T / stride)^2` exists either. A tile is some rows of one batch row, and a job for one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig
from stem_attn.workers import cores_each, run_jobs, team_size

# Logits of a tile, all heads together: what the cache of each core at work on it holds, or a call's launches are worth
# on other devices.
_CPU_TILE_LOGITS = 2**20
_TILE_LOGITS = 2**24
_LOG2_E = math.log2(math.e)


class RowScores(NamedTuple):
    """Scores of block pairs, made when they are asked for.

    `start()` returns a function for one thread. That gives the scores of rows [start, stop) of a batch row for
    `(sample, start, stop)`: float32 [Hq, rows, Kb] in natural-log units. Blocks of the future have some score too.
    `step` is how many rows to ask for at most.
    """

    start: Callable[[], Callable[[int, int, int], Tensor]]
    step: int


def block_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score every key block for every query block: `row_scores` of all rows.

    Returns:
        float32 [B, Hq, Qb, Kb] in natural-log units. Blocks of the future have scores too: selection ignores them.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    scores = row_scores(q, k, v, config, scale, softcap, sinks)
    out = torch.empty(*q.shape[:2], grid.q_blocks, grid.k_blocks, dtype=torch.float32, device=q.device)
    rows = scores.start()
    for sample in range(q.shape[0]):
        for start in range(0, grid.q_blocks, scores.step):
            stop = min(start + scores.step, grid.q_blocks)
            out[sample, :, start:stop] = rows(sample, start, stop)
    return out


def row_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> RowScores:
    """Prepare to score every key block for query blocks.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        config: Reads `block_size`, `score`, `stride`, `spread_weight`, `value_term` and `value_weight`.
        scale: Factor of the attention logits, usually `1 / sqrt(D)`.
        softcap: What their magnitude stays below; the estimate of a logit is capped as a logit is. None: no softcap.
        sinks: [Hq], one more logit a head that takes its share of the mass, see `_mass`; linear scores have none to
            give. None: no sinks.

    Source: Stem, Eq. 7; the pairing of positions is XAttention's antidiagonal.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    batch, kv_heads = k.shape[:2]
    make_keys, score = (_linear_keys, _linear) if config.score == "linear" else (_mass_keys, _mass)
    sinks = None if sinks is None else sinks.float()
    keys: list[Tensor] = [k] * (batch * kv_heads)  # each replaced by what it is prepared to
    bonus = torch.zeros(batch, kv_heads, grid.k_blocks, dtype=torch.float32, device=k.device)

    def prepare(number: int) -> None:
        sample, head = divmod(number, kv_heads)
        keys[number] = make_keys(k[sample, head], config)
        if config.value_term != "none":
            term = _log_term if config.value_term == "log" else _zscore_term
            bonus[sample, head] = term(v[sample, head], config)

    run_jobs(batch * kv_heads, lambda: prepare)
    by_sample = [torch.stack(keys[i * kv_heads : (i + 1) * kv_heads]) for i in range(batch)]
    runs = 1 if config.score == "linear" else config.block_size**2 // (config.query_stride * config.stride)
    logits = q.shape[1] * runs * grid.k_blocks  # of a row
    step = max(1, (_CPU_TILE_LOGITS * cores_each() if q.device.type == "cpu" else _TILE_LOGITS) // logits)
    step = min(step, -(-batch * grid.q_blocks // team_size()))  # a tile for every thread

    def start() -> Callable[[int, int, int], Tensor]:
        # Fresh memory would cost as much as the products that are written to it.
        room = torch.empty(min(step, grid.q_blocks) * logits, dtype=torch.float32, device=q.device)

        def rows(sample: int, first: int, stop: int) -> Tensor:
            tokens = slice(grid.q_span(first)[0], grid.q_span(stop - 1)[1])
            logits = scale, softcap, sinks
            scores = score(q[sample, :, tokens], by_sample[sample], grid, first, stop, config, *logits, room)
            if config.value_term != "none":
                by_head = scores.view(kv_heads, -1, stop - first, grid.k_blocks)
                by_head.add_(bonus[sample, :, None, None], alpha=config.value_weight)
            return scores

        return rows

    return RowScores(start, step)


def _linear_keys(k: Tensor, config: StemConfig) -> Tensor:
    """Add up a head's keys by position modulo the stride: float32 [stride * D, Kb] for k [Tk, D].

    Query group g meets key group `stride - 1 - g`.
    """
    groups = _group_sums(k, 0, config.block_size, config.stride, within=False)
    return groups.mul_(config.stride / config.block_size).flip(1).flatten(1).T


def _linear(
    q: Tensor,
    keys: Tensor,
    grid: BlockGrid,
    start: int,
    stop: int,
    config: StemConfig,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    room: Tensor,
) -> Tensor:
    """Mean of the antidiagonal dot products of every block pair: float32 [Hq, rows, Kb].

    Tokens that a partial block lacks count as zeros, as in the official code. A softcap caps the mean: what it leaves
    of every product would need them all.

    Args:
        q: [Hq, tokens, D], those of rows [start, stop).
        keys: float32 [Hkv, stride * D, Kb], of `_linear_keys`.
        grid: The geometry of the rows.
        start: First row.
        stop: One past the last row.
        config: Reads `block_size` and `stride`.
        scale: Factor of the attention logits.
        softcap: Of the attention logits, or None.
        sinks: Not needed: a mean of logits is no mass, and the order of a row's blocks does not depend on them.
        room: float32; not needed.
    """
    groups = _group_sums(q, _lead(grid, start), config.block_size, config.stride, within=False)
    groups.mul_(config.stride / config.block_size)
    # The query heads of one KV head are rows of one matrix product: K is never repeated.
    scores = groups.view(len(keys), -1, keys.shape[1]) @ keys
    _scale_and_cap(scores, scale / config.stride, softcap, 1)
    return scores.view(len(q), stop - start, grid.k_blocks)


def _mass_keys(k: Tensor, config: StemConfig) -> Tensor:
    """Average a head's keys over runs of `stride`, their spread behind them: float32 [depth, Kb * runs] for k [Tk, D].

    What a run that the sequence does not fill up is weighted with is `_run_sizes`'.
    """
    size, stride, k = config.block_size, config.stride, k.float()
    counts = _run_sizes(0, len(k), size, stride, k.device).clamp_(min=1)[..., None]
    means = _group_sums(k, 0, size, stride, within=True).div_(counts)
    if config.spread_weight:
        squares = _group_sums(k, 0, size, stride, within=True, square=True).div_(counts)
        means = torch.cat([means, _pair_sums(squares.sub_(means.square()).clamp_(min=0))], -1)
    return means.flatten(0, 1).T


def _mass(
    q: Tensor,
    keys: Tensor,
    grid: BlockGrid,
    start: int,
    stop: int,
    config: StemConfig,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    room: Tensor,
) -> Tensor:
    """Log of the largest share of attention that a key block takes from a group of a query block.

    Runs of `stride` keys and of `query_stride` queries stand for their mean; a run cut short by an end of the sequence
    for the mean of the tokens it has. What keys are apart from their mean adds to a logit what it adds to the mean of
    an exponential, to second order: half the variance of the dot product, with the dimensions taken as independent.
    Dimensions j and j + D/2 count together, for rotary embeddings turn them as a pair. With stride 8 the estimate costs
    1/171 of dense attention, 1/256 without the spread.

    A softcap caps the sum of a run's logit and its spread's part: so a run's estimate stays below the cap, as every
    token's logit does, and grows where they do.

    A sink takes its part of every share, because what a pruned block takes from the output is its share of all that
    the softmax sums up. So query groups that look at the sink count less for their row, and among heads that share a
    budget those whose attention goes to their sinks give blocks up to those who read values.

    A share that is no number, of NaN or of an overflow, counts as none: only the blocks and groups that it comes from
    lose by it.

    Args:
        q: [Hq, tokens, D], those of rows [start, stop).
        keys: float32 [Hkv, depth, Kb * runs], of `_mass_keys`.
        grid: The geometry of the rows.
        start: First row.
        stop: One past the last row.
        config: Reads `block_size`, `stride` and `spread_weight`.
        scale: Factor of the attention logits.
        softcap: Of the attention logits, or None.
        sinks: float32 [Hq], or None.
        room: float32; overwritten, as large as the logits.

    Returns:
        float32 [Hq, rows, Kb]; -inf for blocks of the future.
    """
    kv_heads, depth, _ = keys.shape
    size, stride, rows = config.block_size, config.stride, stop - start
    q_runs, k_runs = size // config.query_stride, size // stride  # of a block
    lead = _lead(grid, start)
    q_sizes = _run_sizes(lead, q.shape[1], size, config.query_stride, q.device)
    queries = _group_sums(q, lead, size, config.query_stride, within=True).div_(q_sizes.clamp(min=1)[..., None])
    if config.spread_weight:
        weight = config.spread_weight * scale / 4  # halves: of the variance, and of a pair of squares
        queries = torch.cat([queries, _pair_sums(queries.square()).mul_(weight)], -1)
    seen = grid.first_block + stop  # key blocks that any of these rows sees
    queries = queries.view(kv_heads, -1, depth)
    shape = (*queries.shape[:2], seen * k_runs)
    logits = torch.bmm(queries, keys[..., : seen * k_runs], out=room[: math.prod(shape)].view(shape))
    # In powers of two, which are cheaper than those of e. A run without tokens gets -inf: nothing falls to it.
    k_sizes = _run_sizes(0, grid.k_len, size, stride, q.device).flatten()[: seen * k_runs]
    _scale_and_cap(logits, scale, softcap, _LOG2_E)
    logits.add_(k_sizes.log2_())
    logits = logits.view(len(q), rows, q_runs, seen, k_runs)
    peak = logits.amax(-1, keepdim=True)
    taken = logits.sub_(peak).exp2_().sum(-1).log2_().add_(peak[..., 0]).div_(_LOG2_E)
    taken.nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
    own = torch.arange(grid.first_block + start, seen, dtype=torch.int64, device=q.device)
    future = torch.arange(seen, dtype=torch.int64, device=q.device) > own[:, None, None]
    taken.masked_fill_(future, -torch.inf)
    whole = taken.logsumexp(-1, keepdim=True)
    taken -= whole if sinks is None else whole.logaddexp(sinks[:, None, None, None])
    taken.masked_fill_((q_sizes == 0)[..., None], -torch.inf)
    scores = torch.full((len(q), rows, grid.k_blocks), -torch.inf, dtype=torch.float32, device=q.device)
    scores[..., :seen] = taken.nan_to_num_(-torch.inf, -torch.inf, -torch.inf).amax(2)
    return scores


def _scale_and_cap(logits: Tensor, scale: float, softcap: float | None, unit: float) -> None:
    """Scale logits, cap them where there is a softcap, and give them in other units, all in place."""
    if softcap is None:
        logits.mul_(scale * unit)
    else:
        logits.mul_(scale / softcap).tanh_().mul_(softcap * unit)


def _lead(grid: BlockGrid, row: int) -> int:
    """Return how many tokens of a row's block precede the row's first query."""
    return (grid.q_span(row)[0] + grid.offset) % grid.block_size


def _pair_sums(x: Tensor) -> Tensor:
    """Add up dimensions j and j + D/2: [..., D] to [..., ceil(D / 2)]."""
    half = -(-x.shape[-1] // 2)
    sums: Tensor = torch.unflatten(F.pad(x, (0, 2 * half - x.shape[-1])), -1, (2, half)).sum(-2)
    return sums


def _group_sums(x: Tensor, lead: int, size: int, stride: int, *, within: bool, square: bool = False) -> Tensor:
    """Add up the tokens of each block by group; tokens that a partial block lacks count as zeros.

    Args:
        x: [..., T, D].
        lead: Tokens of the first block that precede x.
        size: Tokens of a block.
        stride: Tokens.
        within: Whether a group is `stride` tokens in a row, or every token of the same position modulo the stride.
        square: Whether to add up squares.

    Returns:
        float32 [..., blocks, groups, D]; `size / stride` groups within, or `stride` across.
    """
    *outer, length, dim = x.shape
    groups = size // stride if within else stride
    blocks = -(-(lead + length) // size)
    sums = torch.empty(*outer, blocks, groups, dim, dtype=torch.float32, device=x.device)

    def write(first: int, tokens: Tensor) -> None:
        tokens = tokens.float().square() if square else tokens
        parts = torch.unflatten(tokens, -2, (-1, size // stride, stride))
        place = sums[..., first : first + parts.shape[-4], :, :]
        torch.sum(parts, -2 if within else -3, dtype=torch.float32, out=place)

    # Partial blocks are padded on their own, so that x is never copied whole.
    head = min(-lead % size, length)
    if head:
        write(0, F.pad(x[..., :head, :], (0, 0, lead, size - lead - head)))
    whole = (length - head) // size * size
    first = 1 if lead else 0
    if whole:
        write(first, x[..., head : head + whole, :])
    tail = length - head - whole
    if tail:
        write(first + whole // size, F.pad(x[..., head + whole :, :], (0, 0, 0, size - tail)))
    return sums


def _run_sizes(lead: int, length: int, size: int, stride: int, device: torch.device) -> Tensor:
    """Count the tokens of every run of `stride`: float32 [blocks, size / stride]."""
    blocks = -(-(lead + length) // size)
    starts = torch.arange(0, blocks * size, stride, dtype=torch.float32, device=device)
    present = (lead + length - starts).clamp_(max=stride) - (lead - starts).clamp_(min=0)
    return present.clamp_(min=0).view(blocks, -1)


def _norms(v: Tensor) -> Tensor:
    """Magnitudes float32 [Tk] of values [Tk, Dv]; summed up in v's own dtype where that is finer."""
    norms: Tensor = torch.linalg.vector_norm(v, dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))
    return norms.float()


def _log_term(v: Tensor, config: StemConfig) -> Tensor:
    """Largest `max(0, log |v|)` of each key block: float32 [Kb] for v [Tk, Dv]."""
    norms = _norms(v)
    padded = F.pad(norms, (0, -len(norms) % config.block_size))
    largest: Tensor = torch.unflatten(padded, -1, (-1, config.block_size)).amax(-1)
    logs: Tensor = largest.clamp_(min=1).log_()
    return logs


def _zscore_term(v: Tensor, config: StemConfig) -> Tensor:
    """Block means of the rectified z-score of log magnitude over the sequence: float32 [Kb] for v [Tk, Dv].

    Only whole groups of `stride` tokens count; the rest of the last block counts as zeros.
    """
    norms = _norms(v)
    groups = len(norms) // config.stride
    blocks = -(-len(norms) // config.block_size)
    if groups < 2:  # no deviation to speak of
        return torch.zeros(blocks, dtype=torch.float32, device=v.device)
    whole = norms[: groups * config.stride]
    logs = (torch.unflatten(whole, -1, (groups, config.stride)).amax(-1) + 1e-6).log_()
    std, mean = torch.std_mean(logs, dim=-1, keepdim=True)
    z: Tensor = ((logs - mean) / (std + 1e-6)).clamp_(min=0)
    per_block = config.block_size // config.stride
    padded = F.pad(z, (0, blocks * per_block - groups))
    block_means: Tensor = torch.unflatten(padded, -1, (blocks, per_block)).mean(-1)
    return block_means
