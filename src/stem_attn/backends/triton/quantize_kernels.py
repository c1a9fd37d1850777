"""Round q, k and v to 8 bits (e4m3) for the attention kernel that multiplies such numbers.

Rounded copies hold whole blocks: tokens that a block lacks are zeros. Numbers are divided by a scale, so that none is
above 448, e4m3's largest: a query's by one of its own, a head's keys by one, and its values. A number has four digits
down to 2^-15 of that, so a finer scale would gain nothing, and that of keys may be a bound: what a rotation can make of
a key whose every dim is the furthest from the mean.

Queries and keys are rotated first, by signs and a Hadamard matrix: that leaves their dot products as they are, and
spreads dims that are much larger than others, whose rounding would be most of the error. Then keys lose their mean over
the head's tokens. That takes the same from all dot products of a query, which a softmax does not see. What it takes is
written where something else sees it: the log-sum-exp, a sink, a softcap.

A KV head is marked, and must be computed in the precision that it came in, where 8 bits do not hold its numbers: where
some are not finite, or where most numbers of a tile are much smaller than the head's largest: of values, so small that
e4m3 has fewer than four digits for them; of keys, a 256th of the bound's share of a dim, or so small that one token may
have made the mean. A query that is not finite becomes NaN, as its output would.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.kernel_pages import page_of, token_offset

LARGEST = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-15)
"""Below it magnitudes count as this: the product of two scales must not vanish."""
NORMAL = tl.constexpr(2.0**-6)
"""Smaller e4m3 numbers have fewer than four digits."""


@triton.jit(do_not_specialize=["k_len", "chunk"], do_not_specialize_on_alignment=["block_table"])
def measure_kernel(
    k,  # [B, Hkv, Tk, D]; [pages, Hkv, PAGE, D] where paged, and then B = 1
    v,  # [B, Hkv, Tk, DV], likewise
    measured,  # float32 [B * Hkv, CHUNKS, 5, DIMS]: of k sums, maxima, minima; of v's magnitudes sums, maxima
    block_table,  # int32 [pages of the sequence]; unused unless paged
    k_strides,  # (batch, head, token) in elements
    v_strides,
    kv_heads,
    k_len,
    chunk,  # tokens a program
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    DIMS: tl.constexpr,  # the larger one
    TOKENS: tl.constexpr,  # loaded at once
    PAGE: tl.constexpr,  # tokens a page of k and v; 0: not paged
):
    """Measure a run of a head's keys and values."""
    head = tl.program_id(1).to(tl.int64)
    k += _head_offset(head, kv_heads, k_strides, PAGE)
    v += _head_offset(head, kv_heads, v_strides, PAGE)
    dims = tl.arange(0, D_PAD)
    dims_v = tl.arange(0, DV_PAD)
    start = tl.program_id(0) * chunk
    stop = min(start + chunk, k_len)
    sums = tl.zeros([TOKENS, D_PAD], tl.float32)
    highest = tl.full([TOKENS, D_PAD], float("-inf"), tl.float32)
    lowest = tl.full([TOKENS, D_PAD], float("inf"), tl.float32)
    sizes = tl.zeros([TOKENS, DV_PAD], tl.float32)
    largest = tl.zeros([TOKENS, DV_PAD], tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        held = (token < stop)[:, None]
        page = page_of(block_table, token, token < stop, PAGE)
        key_at = k + token_offset(token, page, k_strides, PAGE)[:, None] + dims
        key = tl.load(key_at, mask=held & (dims < D), other=0.0).to(tl.float32)
        sums += key
        highest = tl.where(held, tl.maximum(highest, key), highest)
        lowest = tl.where(held, tl.minimum(lowest, key), lowest)
        value_at = v + token_offset(token, page, v_strides, PAGE)[:, None] + dims_v
        size = tl.abs(tl.load(value_at, mask=held & (dims_v < DV), other=0.0).to(tl.float32))
        sizes += size
        largest = tl.maximum(largest, size)
    measured += (head * tl.num_programs(0) + tl.program_id(0)) * (5 * DIMS)
    tl.store(measured + dims, tl.sum(sums, 0))
    tl.store(measured + DIMS + dims, tl.max(highest, 0))
    tl.store(measured + 2 * DIMS + dims, tl.min(lowest, 0))
    tl.store(measured + 3 * DIMS + dims_v, tl.sum(sizes, 0))
    tl.store(measured + 4 * DIMS + dims_v, tl.max(largest, 0))


@triton.jit(do_not_specialize=["k_len"])
def combine_kernel(
    measured,  # float32 [B * Hkv, CHUNKS, 5, DIMS], from `measure_kernel`
    means,  # float32 [B * Hkv, DIMS], of rotated k; written
    scales,  # float32 [2, B * Hkv], of k and v; written
    unsafe,  # int32 [B * Hkv], whether some number of a head is not finite; written
    k_len,
    CHUNKS: tl.constexpr,  # a power of two
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Combine what was measured of a head."""
    head = tl.program_id(0)
    dims = tl.arange(0, D_PAD)
    chunks = measured + (head * CHUNKS + tl.arange(0, CHUNKS))[:, None] * (5 * DIMS)
    at = chunks + dims
    mean = tl.sum(tl.load(at), 0) / k_len
    above = tl.max(tl.load(at + DIMS), 0) - mean
    below = mean - tl.min(tl.load(at + 2 * DIMS), 0)
    furthest = tl.maximum(above, below)
    size = tl.sqrt(tl.sum(furthest * furthest, 0))
    at_v = chunks + 3 * DIMS + tl.arange(0, DV_PAD)
    size_v = tl.max(tl.max(tl.load(at_v + DIMS), 0), 0)
    # The mean of rotated keys is the rotated mean.
    rotation = _rotation(D_PAD, tl.float32)
    RUN: tl.constexpr = rotation.shape[0]
    rotated = tl.sum(tl.reshape(mean, [D_PAD // RUN, RUN])[:, :, None] * rotation[None, :, :], 1) * (1.0 / RUN**0.5)
    tl.store(means + head * DIMS + dims, tl.reshape(rotated, [D_PAD]))
    tl.store(scales + head, tl.maximum(size, SMALLEST) / LARGEST)
    tl.store(scales + tl.num_programs(0) + head, tl.maximum(size_v, SMALLEST) / LARGEST)
    everything = size + tl.sum(tl.abs(mean), 0) + tl.sum(tl.sum(tl.load(at_v), 0), 0)
    tl.store(unsafe + head, (everything < float("inf")).to(tl.int32) ^ 1)  # NaN is not less


@triton.jit(
    do_not_specialize=["q_offset", "q_len", "k_len", "q_blocks", "k_blocks", "run"],
    do_not_specialize_on_alignment=["block_table"],
)
def quantize_kernel(
    q,  # [B, Hq, Tq, D], the last Tq of Tk tokens
    k,  # [B, Hkv, Tk, D]; [pages, Hkv, PAGE, D] where paged, and then B = 1
    v,  # [B, Hkv, Tk, DV], likewise
    means,  # float32 [B * Hkv, DIMS], of rotated k
    scales,  # float32 [2, B * Hkv], of k and v
    q8,  # e4m3 [B * Hq, Qb * BLOCK, D_PAD], rotated; written, as all that follow
    k8,  # e4m3 [B * Hkv, Kb * BLOCK, D_PAD], rotated
    v8,  # e4m3 [B * Hkv, Kb, DV_PAD, BLOCK], the keys of a block in the order of `_key_of_slot`
    unsafe,  # int32 [B * Hkv]; set where a block does not fit
    q_scales,  # float32 [B * Hq, Qb * BLOCK]
    shifts,  # float32 [B * Hq, Qb * BLOCK], the dot products with the mean key; unused unless SHIFTS
    block_table,  # int32 [pages of the sequence]; unused unless paged
    q_strides,  # (batch, head, token) in elements
    k_strides,
    v_strides,
    batch_heads,  # B * Hq
    batch_kv_heads,  # B * Hkv
    group,  # Hq / Hkv
    kv_heads,
    q_offset,  # tokens of the first query block that come before q
    q_len,
    k_len,
    q_blocks,
    k_blocks,
    run,  # tiles a program
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,  # a tile's; a multiple of 16 that divides BLOCK
    SHIFTS: tl.constexpr,
    PAGE: tl.constexpr,  # tokens a page of k and v; 0: not paged
):
    """Round a run of tiles of a head of q, k or v."""
    program = tl.program_id(0)
    q_tiles = q_blocks * (BLOCK // TOKENS)
    k_tiles = k_blocks * (BLOCK // TOKENS)
    q_runs = batch_heads * tl.cdiv(q_tiles, run)
    k_runs = batch_kv_heads * tl.cdiv(k_tiles, run)
    # What differs in type between the branches has names of its own.
    dims = tl.arange(0, D_PAD)
    slot = tl.arange(0, TOKENS)
    if program < q_runs:
        head = (program // tl.cdiv(q_tiles, run)).to(tl.int64)
        first = program % tl.cdiv(q_tiles, run) * run
        q += _head_offset(head, kv_heads * group, q_strides, 0)
        q_rotation = _rotation(D_PAD, q.dtype.element_ty)
        if SHIFTS:
            q_mean = tl.load(means + head // group * DIMS + dims)
        for tile in range(first, min(first + run, q_tiles)):
            token = tile * TOKENS - q_offset + slot
            q_at = q + token.to(tl.int64)[:, None] * q_strides[2] + dims
            held = (token >= 0) & (token < q_len)
            query = tl.load(q_at, mask=held[:, None] & (dims < D), other=0.0)
            query = _rotate(query, q_rotation)
            q_scale = tl.maximum(tl.max(tl.abs(query), 1), SMALLEST) / LARGEST
            q_row = (head * q_tiles + tile) * TOKENS + slot
            tl.store(q8 + q_row[:, None] * D_PAD + dims, (query * (1.0 / q_scale)[:, None]).to(tl.float8e4nv))
            tl.store(q_scales + q_row, q_scale)
            if SHIFTS:
                tl.store(shifts + q_row, tl.sum(query * q_mean[None, :], 1))
    elif program < q_runs + k_runs:
        program -= q_runs
        head = (program // tl.cdiv(k_tiles, run)).to(tl.int64)
        first = program % tl.cdiv(k_tiles, run) * run
        k += _head_offset(head, kv_heads, k_strides, PAGE)
        k_rotation = _rotation(D_PAD, k.dtype.element_ty)
        mean = tl.load(means + head * DIMS + dims)
        k_factor = 1.0 / tl.load(scales + head)
        limit = LARGEST / D_PAD**0.5 / tl.minimum(tl.maximum(k_len / 2, 16.0), 256.0)
        for tile in range(first, min(first + run, k_tiles)):
            token = tile * TOKENS + slot
            held = token < k_len
            page = page_of(block_table, token, held, PAGE)
            k_at = k + token_offset(token, page, k_strides, PAGE)[:, None] + dims
            key = tl.load(k_at, mask=held[:, None] & (dims < D), other=0.0)
            key = _rotate(key, k_rotation)
            key = tl.where(held[:, None], key - mean[None, :], 0.0) * k_factor
            k8_at = k8 + (head * k_tiles + tile) * (TOKENS * D_PAD) + slot[:, None] * D_PAD + dims
            tl.store(k8_at, key.to(tl.float8e4nv))
            _mark_small(key, limit, unsafe + head, TOKENS * D_PAD)
    else:
        program -= q_runs + k_runs
        head = (program // tl.cdiv(k_tiles, run)).to(tl.int64)
        first = program % tl.cdiv(k_tiles, run) * run
        v += _head_offset(head, kv_heads, v_strides, PAGE)
        dims_v = tl.arange(0, DV_PAD)
        v_factor = 1.0 / tl.load(scales + batch_kv_heads + head)
        for tile in range(first, min(first + run, k_tiles)):
            token = tile * TOKENS + _key_of_slot(slot)
            held = token < k_len
            page = page_of(block_table, token, held, PAGE)
            v_at = v + token_offset(token, page, v_strides, PAGE)[:, None] + dims_v
            value = tl.load(v_at, mask=held[:, None] & (dims_v < DV), other=0.0).to(tl.float32) * v_factor
            v8_at = v8 + (head * k_blocks + tile * TOKENS // BLOCK) * (DV_PAD * BLOCK) + dims_v[:, None] * BLOCK
            v8_at += tile * TOKENS % BLOCK + slot
            tl.store(v8_at, tl.trans(value.to(tl.float8e4nv)))
            _mark_small(value, NORMAL, unsafe + head, TOKENS * DV)


@triton.jit
def _head_offset(head, heads, strides, PAGE: tl.constexpr):
    """Return where a head of [B, heads, T, D] starts, counted over the batch; in pages there is no batch."""
    if PAGE > 0:
        return head * strides[1]
    else:
        return head // heads * strides[0] + head % heads * strides[1]


@triton.jit
def _rotation(DIMS: tl.constexpr, dtype: tl.constexpr):
    """Return a Hadamard matrix whose rows have signs of their own, 1 and -1, for runs of up to 128 of some dims."""
    RUN: tl.constexpr = min(DIMS, 128)  # a larger one would fill shared memory
    row = tl.arange(0, RUN)[:, None]
    odd = row & tl.arange(0, RUN)[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= (odd >> 1) ^ (row * row * 5 >> 3)  # bits that look drawn: without them, equal dims would gather in one
    return (1 - 2 * (odd & 1)).to(dtype)


@triton.jit
def _rotate(x, rotation):
    """Rotate the runs of dims of 16-bit rows; the products are exact, their sums float32."""
    RUN: tl.constexpr = rotation.shape[0]
    runs = tl.reshape(x, [x.shape[0] * (x.shape[1] // RUN), RUN])
    return tl.reshape(tl.dot(runs, rotation), x.shape) * (1.0 / RUN**0.5)


@triton.jit
def _key_of_slot(slot):
    """Return which key of a block lies in a slot, so that weights need not move; see `hopper_fp8_kernel._pack`."""
    return slot // 16 * 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2


@triton.jit
def _mark_small(x, limit, mark, COUNT: tl.constexpr):
    """Set a mark if more than half of COUNT numbers are smaller than a limit, but not zero."""
    small = (tl.abs(x) < limit) & (x != 0.0)
    if tl.sum(tl.sum(small.to(tl.int32), 1), 0) * 2 > COUNT:
        tl.store(mark, 1)
