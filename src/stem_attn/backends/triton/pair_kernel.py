"""Join the lists of two neighbouring rows into one, for the Hopper kernel with blocks of 64.

Two rows share most of what they keep. What both keep is copied into shared memory once: without that the kernel waits
for L2 (docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADER = 8
"""Numbers before the blocks of a pair: five counts, and nothing."""


@triton.jit(
    do_not_specialize=[
        "index_batch",
        "index_head",
        "index_row",
        "count_batch",
        "count_head",
        "count_row",
        "out_batch",
        "out_head",
        "out_row",
        "rows",
        "pairs",
        "first_block",
    ],
)
def pair_kernel(
    indices,  # int32 [B, Hq, R, S], ascending, last stride 1
    counts,  # int32 [B, Hq, R]
    out,  # int32 [B, Hq, P, HEADER + at most 2 S], last stride 1
    index_batch,  # strides in elements, of indices, counts and out
    index_head,
    index_row,
    count_batch,
    count_head,
    count_row,
    out_batch,
    out_head,
    out_row,
    rows,
    pairs,
    first_block,  # the first row's own
    START: tl.constexpr,  # HEADER
    CHUNK: tl.constexpr,  # slots of a list at a time
):
    """Write how many blocks are of each kind, then the blocks, each kind from the last to the first.

    The second row's own block, which the first cannot see; the first row's own where the second does not keep it; those
    that both keep; and those that one keeps, in turns from the second row's on, the rest of the longer list last. So
    between two blocks of a row there is at most one of the other row alone. A last row without a second is paired with
    itself.
    """
    pair = tl.program_id(0) % pairs
    head = (tl.program_id(0) // pairs).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = 2 * pair
    second_alone = (row + 1 < rows).to(tl.int32)
    indices += batch * index_batch + head * index_head + row.to(tl.int64) * index_row
    counts += batch * count_batch + head * count_head + row * count_row
    others = indices + second_alone * index_row
    count = tl.load(counts)
    other_count = tl.load(counts + second_alone * count_row)
    diagonal = first_block + row
    own = _holds(tl.full([1], 0, tl.int32) + diagonal, others, other_count)
    first_alone = 1 - tl.sum(own.to(tl.int32))
    both = 0
    for start in tl.range(0, count, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        block = tl.load(indices + slot, mask=slot < count, other=-1)
        both += tl.sum((_holds(block, others, other_count) & (slot < count)).to(tl.int32))
    of_first = count - both - first_alone
    of_second = other_count - both - second_alone

    out += batch * out_batch + head * out_head + pair.to(tl.int64) * out_row
    tl.store(out, second_alone)
    tl.store(out + 1, first_alone)
    tl.store(out + 2, both)
    tl.store(out + 3, of_first)
    tl.store(out + 4, of_second)
    out += START
    tl.store(out, diagonal + 1, mask=second_alone > 0)
    tl.store(out + second_alone, diagonal, mask=first_alone > 0)
    out += second_alone + first_alone
    _write(out, indices, count, others, other_count, diagonal, both, of_first, of_second, 1, True, CHUNK)
    _write(out, others, other_count, indices, count, diagonal, both, of_second, of_first, 0, False, CHUNK)


@triton.jit
def _write(
    out, indices, count, others, other_count, diagonal, both, lone, other_lone, turn, FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write one row's blocks: the first row's with those that both keep."""
    shared_before = 0
    for start in tl.range(0, count, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        valid = slot < count
        block = tl.load(indices + slot, mask=valid, other=-1)
        shared = _holds(block, others, other_count) & valid
        number = shared.to(tl.int32)
        before = shared_before + tl.cumsum(number, 0) - number
        shared_before += tl.sum(number)
        if FIRST:
            tl.store(out + both - 1 - before, block, mask=shared)
            mine = valid & (block < diagonal) & (number == 0)
        else:
            mine = valid & (block <= diagonal) & (number == 0)
        rank = lone - 1 - (slot - before)
        tl.store(out + both + rank + tl.minimum(rank + turn, other_lone), block, mask=mine)


@triton.jit
def _holds(blocks, at, count):
    """Tell which blocks an ascending list holds, by bisection."""
    low = blocks * 0
    high = low + count
    left = count
    while left > 0:
        left //= 2
        middle = (low + high) // 2
        below = (low < high) & (tl.load(at + tl.minimum(middle, count - 1)) < blocks)
        high = tl.where(below | (low >= high), high, middle)
        low = tl.where(below, middle + 1, low)
    return (low < count) & (tl.load(at + tl.minimum(low, count - 1)) == blocks)
