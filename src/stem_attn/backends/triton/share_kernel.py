"""The kernel that deals a shared budget out to the heads that compete for it."""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.selection_kernels import number, ordered


@triton.jit(
    do_not_specialize=["first_row", "q_blocks", "first_block", "sink", "local", "keep_stride", "least_at", "scope"]
)
def share_kernel(
    scores,  # float32 [B * Hkv, rows * group, pitch]: of every query block the heads of a KV head
    keep,  # int32, of the whole prompt: blocks that a head may take alone, [n] or [B, n]; then what it keeps at least
    counts,  # int32 [B * Hkv, group, Qb]: written; unless INSIDE it holds what every head keeps alone
    keep_stride,  # from one batch row to the next; 0 where they share a budget
    least_at,  # where the least numbers start in keep
    first_row,  # the first query block that scores holds
    group,  # query heads a KV head
    kv_heads,
    scope,  # KV heads whose query heads compete
    q_blocks,
    first_block,
    pitch,
    sink,  # blocks
    local,  # blocks
    HEADS: tl.constexpr,  # a power of two, at least scope * group
    CHUNK: tl.constexpr,  # columns; a power of two, at least 16
    INSIDE: tl.constexpr,  # forced blocks count among those that top-k takes
    NORMALISE: tl.constexpr,  # scores of different heads do not compare, their softmax does
):
    """Count what every head keeps of one query block: together the sum of what they would keep alone.

    Head h keeps the blocks that score at least some cutoff, or `least` blocks where those are fewer. The cutoff is
    the largest at which heads want the whole sum or more; what they want too much, blocks equal to it, the last
    heads give up.
    """
    row = first_row + tl.program_id(0)
    diagonal = first_block + row
    head = tl.arange(0, HEADS)
    live = head < scope * group
    head = tl.minimum(head, scope * group - 1)
    kv_head = tl.program_id(1) * scope + head // group
    counts += (kv_head * group + head % group) * q_blocks + row
    scores += ((kv_head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * group + head % group) * pitch
    keep += tl.program_id(1) * scope // kv_heads * keep_stride + diagonal
    least = tl.load(keep + least_at)
    if INSIDE:
        wanted = tl.load(keep) * scope * group
    else:
        wanted = tl.sum(tl.load(counts, mask=live, other=0), 0)

    norm = tl.zeros([HEADS], tl.float32)
    if NORMALISE:
        peaks = tl.full([HEADS, CHUNK], float("-inf"), tl.float32)
        for first in tl.range(0, diagonal + 1, CHUNK):
            peaks = tl.maximum(peaks, _load(scores, norm, live, first, diagonal, 0, 0, CHUNK))
        peak = tl.where(live, tl.max(peaks, 1), 0.0)
        sums = tl.zeros([HEADS, CHUNK], tl.float32)
        for first in tl.range(0, diagonal + 1, CHUNK):
            sums += tl.exp(_load(scores, peak, live, first, diagonal, 0, 0, CHUNK))
        norm = tl.where(live, peak + tl.log(tl.sum(sums, 1)), 0.0)

    # Bisect the integers in whose order floats are; stop early where exactly as many blocks as wanted are reached.
    lows = tl.full([HEADS, CHUNK], float("inf"), tl.float32)
    highs = tl.full([HEADS, CHUNK], float("-inf"), tl.float32)
    for first in tl.range(0, diagonal + 1, CHUNK):
        score = _load(scores, norm, live, first, diagonal, sink, local, CHUNK)
        lows = tl.minimum(lows, tl.where(score == float("-inf"), float("inf"), score))
        highs = tl.maximum(highs, tl.where(score == float("inf"), float("-inf"), score))
    low = ordered(tl.min(tl.min(lows, 1), 0))
    high = ordered(tl.max(tl.max(highs, 1), 0))
    reached = (diagonal + 1) * scope * group
    while (low < high) & (reached != wanted):
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        count = _reaching(scores, norm, live, middle, least, diagonal, sink, local, HEADS, CHUNK)
        above = tl.sum(count, 0)
        enough = above >= wanted
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
    count = _reaching(scores, norm, live, low + 1, least, diagonal, sink, local, HEADS, CHUNK)
    tied = _reaching(scores, norm, live, low, least, diagonal, sink, local, HEADS, CHUNK) - count
    room = wanted - tl.sum(count, 0) - (tl.cumsum(tied, 0) - tied)
    tl.store(counts, count + tl.minimum(tl.maximum(room, 0), tied), mask=live)


@triton.jit
def _reaching(
    scores, norm, live, cutoff, least, diagonal, sink, local, HEADS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Count the blocks of each head that reach a cutoff, at least `least`; 0 for heads that do not exist."""
    cutoff = number(cutoff)
    hits = tl.zeros([HEADS, CHUNK], tl.int32)
    for first in tl.range(0, diagonal + 1, CHUNK):
        hits += (_load(scores, norm, live, first, diagonal, sink, local, CHUNK) >= cutoff).to(tl.int32)
    return tl.where(live, tl.maximum(tl.sum(hits, 1), least), 0)


@triton.jit
def _load(scores, norm, live, first, diagonal, sink, local, CHUNK: tl.constexpr):
    """Load scores of all heads; inf for forced blocks, -inf for the future and for heads that do not exist."""
    column = first + tl.arange(0, CHUNK)
    causal = column <= diagonal
    forced = (column < sink) | (column > diagonal - local)
    mask = live[:, None] & (column < (diagonal // 16 + 1) * 16)[None, :]  # whole vectors
    score = tl.load(scores[:, None] + column[None, :], mask=mask, other=0.0) - norm[:, None]
    score = tl.where(forced[None, :], float("inf"), score)
    return tl.where(live[:, None] & causal[None, :], score, float("-inf"))
