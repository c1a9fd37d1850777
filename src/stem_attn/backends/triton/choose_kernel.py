"""The kernel that deals a shared budget out and keeps each head's best blocks, for rows that fit into registers."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from stem_attn.backends.triton.selection_kernels import HIGHEST, LOWEST, number, ordered
from stem_attn.backends.triton.store_kernel import store_in_place


@triton.jit(
    do_not_specialize=[
        "first_row",
        "rows",
        "skip",
        "q_blocks",
        "first_block",
        "sink",
        "local",
        "keep_stride",
        "least_at",
        "width",
    ]
)
def choose_kernel(
    scores,  # float32 [B * Hkv, rows * group, pitch], finite: of every query block the heads of a KV head
    keep,  # int32, of the whole prompt: blocks that a head may take alone, [n] or [B, n]; then what it keeps at least
    indices,  # int32 [B * Hkv, group, Qb, width]
    counts,  # int32 [B * Hkv, group, Qb]: written; unless INSIDE it holds what every head keeps alone
    keep_stride,  # from one batch row to the next; 0 where they share a budget
    least_at,  # where the least numbers start in keep
    width,
    first_row,  # the first query block that scores holds
    rows,  # how many it holds
    skip,  # as many of them are another launch's
    group,  # query heads a KV head
    kv_heads,
    scope,  # KV heads whose query heads compete
    q_blocks,
    first_block,
    pitch,
    sink,  # blocks
    local,  # blocks
    HEADS: tl.constexpr,  # a power of two, at least scope * group
    OUTER: tl.constexpr,  # powers of two whose product is more than any of these rows' last block
    INNER: tl.constexpr,
    INSIDE: tl.constexpr,  # forced blocks count among those that top-k takes
    NORMALISE: tl.constexpr,  # scores of different heads do not compare, their softmax does
    CUDA: tl.constexpr,
    CHAINED: tl.constexpr,  # it may start before what made the scores has ended
):
    """Write what every head keeps of one query block: `share_kernel`, then `top_kernel` of each head."""
    if CHAINED:
        gdc_wait()
    slot = skip + tl.program_id(0)
    row = first_row + slot
    diagonal = first_block + row
    head = tl.arange(0, HEADS)
    live = head < scope * group
    head = tl.minimum(head, scope * group - 1)
    kv_head = tl.program_id(1) * scope + head // group
    out_row = (kv_head * group + head % group) * q_blocks + row
    keep += tl.program_id(1) * scope // kv_heads * keep_stride + diagonal
    least = tl.load(keep + least_at)
    if INSIDE:
        wanted = tl.load(keep) * scope * group
    else:
        wanted = tl.sum(tl.load(counts + out_row, mask=live, other=0), 0)

    # The compiler gives heads to warps and the outer axis to threads: sums over a head need no other warp.
    at = ((kv_head * rows + slot).to(tl.int64) * group + head % group) * pitch
    column = (tl.arange(0, OUTER)[None, :, None] * INNER + tl.arange(0, INNER)[None, None, :]).to(tl.int32)
    score = _load(scores, at[:, None, None], column, live[:, None, None], diagonal)
    norm = tl.zeros([HEADS], tl.float32)
    if NORMALISE:
        peak = tl.where(live, tl.max(tl.max(score, 1), 1), 0.0)
        norm = peak + tl.log(tl.sum(tl.sum(tl.exp(score - peak[:, None, None]), 1), 1))
        norm = tl.where(live, norm, 0.0)
    key = _key(score, norm[:, None, None])
    lowest = tl.min(tl.min(tl.min(tl.where(key == LOWEST, HIGHEST, key), 1), 1), 0)
    forced = (column < sink) | (column > diagonal - local)
    high = tl.max(tl.max(tl.max(tl.where(forced, LOWEST, key), 1), 1), 0)
    key = tl.where(forced & (key > LOWEST), HIGHEST, key)
    low = lowest
    high = tl.maximum(low, high)  # where every block is forced

    # Search for the largest cutoff at which heads want all of it or more; stop where they want exactly that. Three
    # steps of four guess where it lies, as if scores were spread evenly; the fourth halves what is left.
    reached = (diagonal + 1) * scope * group
    beyond = tl.sum(tl.where(live, least, 0), 0)
    turn = 0
    while (low < high) & (reached != wanted):
        first, last = number(low), number(high)
        share = (reached - wanted).to(tl.float32) / (reached - beyond)
        guess = ordered(first + (last - first) * share)
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        middle = tl.where(turn % 4 == 3, middle, tl.minimum(tl.maximum(guess, low + 1), high))
        above = tl.sum(tl.where(live, tl.maximum(_reaching(key, middle), least), 0), 0)
        enough = above >= wanted
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
        beyond = tl.where(enough, beyond, above)
        turn += 1
    # What heads want too much, blocks equal to the cutoff, the last of them give up.
    hits = _reaching(key, low)
    count = tl.where(live, tl.maximum(_reaching(key, low + 1), least), 0)
    tied = tl.where(live, tl.maximum(hits, least), 0) - count
    room = wanted - tl.sum(count, 0) - (tl.cumsum(tied, 0) - tied)
    count += tl.minimum(tl.maximum(room, 0), tied)

    # Heads that keep their least need a lower cutoff of their own.
    short = hits < count
    cutoff = tl.where(short, lowest, low)
    bound = tl.where(short, low - 1, low)
    hits = tl.where(short, diagonal + 1, hits)
    while tl.max(((cutoff < bound) & (hits != count)).to(tl.int32), 0) > 0:
        middle = (cutoff | bound) - ((cutoff ^ bound) >> 1)
        above = _reaching(key, middle[:, None, None])
        active = (cutoff < bound) & (hits != count)
        enough = above >= count
        cutoff = tl.where(active & enough, middle, cutoff)
        hits = tl.where(active & enough, above, hits)
        bound = tl.where(active & ~enough, middle - 1, bound)
    # Walk the row once more, for what is left of the registers holds no list.
    spare = count - _reaching(key, (cutoff + 1)[:, None, None])  # of several keys equal to a cutoff the first fill up
    at_index = out_row.to(tl.int64) * width
    filled = tl.zeros([HEADS], tl.int32)
    ties = tl.zeros([HEADS], tl.int32)
    for first in tl.range(0, diagonal + 1, INNER):
        ahead = (first + tl.arange(0, INNER))[None, :]
        again = _key(_load(scores, at[:, None], ahead, live[:, None], diagonal), norm[:, None])
        again = tl.where(((ahead < sink) | (ahead > diagonal - local)) & (again > LOWEST), HIGHEST, again)
        tie = again == cutoff[:, None]
        rank = tl.cumsum(tie.to(tl.int32), 1) + ties[:, None]
        kept = (again > cutoff[:, None]) | (tie & (rank <= spare[:, None]))
        place = tl.cumsum(kept.to(tl.int32), 1) + filled[:, None] - 1
        ties += tl.sum(tie.to(tl.int32), 1)
        filled += tl.sum(kept.to(tl.int32), 1)
        store_in_place(indices + (at_index[:, None] + place), ahead + tl.zeros_like(place), kept, CUDA)
    tl.store(counts + out_row, count, mask=live)
    for first in tl.range(0, width, INNER):
        place = (first + tl.arange(0, INNER))[None, :]
        rest = live[:, None] & (place >= count[:, None]) & (place < width)
        tl.store(indices + at_index[:, None] + place, -1, mask=rest)


@triton.jit
def _load(scores, at, column, live, diagonal):
    """Load scores of all heads; -inf for the future and for heads that do not exist."""
    held = live & (column < (diagonal // 16 + 1) * 16)  # whole vectors
    score = tl.load(scores + at + column, mask=held, other=0.0)
    return tl.where(live & (column <= diagonal), score, float("-inf"))


@triton.jit
def _key(score, norm):
    """Map scores less their norms to integers in the same order, those of what does not exist to the lowest."""
    return tl.where(score == float("-inf"), LOWEST, ordered(score - norm))


@triton.jit
def _reaching(key, cutoff):
    """Count the keys [HEADS, OUTER, INNER] of each head that reach a cutoff."""
    return tl.sum(tl.sum((key >= cutoff).to(tl.int32), 1), 1)
