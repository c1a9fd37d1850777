"""The selection kernels: pool q, k and v; standardise magnitudes; score block pairs; keep the best of each row.

Scores come from pooled blocks (see `stem_attn.scoring`): one vector of STRIDE * D means a block. A pooled block is
stored divided by the power of two just below its largest magnitude, and that power in a table of its own. So float16
holds the means of 16-bit inputs with 11 significant bits whatever their range: the precision of TF32 at half the
bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.kernel_pages import token_offset

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit(
    do_not_specialize=["q_offset", "q_len", "k_len", "q_blocks", "k_blocks"],
    do_not_specialize_on_alignment=["block_table"],
)
def pool_kernel(
    q,  # [B, Hq, Tq, D], the last Tq of Tk tokens
    k,  # [B, Hkv, Tk, D]; [pages, Hkv, PAGE, D] where paged, and then B = 1
    v,  # [B, Hkv, Tk, DV], likewise
    pooled,  # [B * Hq * Qb + B * Hkv * Kb, STRIDE * D_OUT]: the rows of q, then those of k; zeros past D
    table,  # float32: the power of each row of pooled, then the weighted value term of each row of k
    logs,  # float32 [B * Hkv, Kb * BLOCK / STRIDE], log magnitudes; only where ZSCORE, and then instead of the term
    block_table,  # int32 [pages of the sequence]; unused unless paged
    q_strides,  # (batch, head, token, dim) in elements
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
    weight,  # of the value term
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    D_OUT: tl.constexpr,  # a multiple of 8
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,  # how many are loaded at once; a multiple of STRIDE
    PAGE: tl.constexpr,  # tokens a page of k and v; 0: not paged
    ZSCORE: tl.constexpr,
):
    """Pool one block of q or k, or measure one block of v."""
    program = tl.program_id(0)
    q_rows = batch_heads * q_blocks
    k_rows = batch_kv_heads * k_blocks
    if program < q_rows:
        head = (program // q_blocks).to(tl.int64)
        q += head // (kv_heads * group) * q_strides[0] + head % (kv_heads * group) * q_strides[1]
        start = program % q_blocks * BLOCK - q_offset
        _pool(q, pooled, table, program, start, q_len, block_table, q_strides,
              D, D_PAD, D_OUT, BLOCK, STRIDE, TOKENS, 0, False)  # fmt: skip
    elif program < q_rows + k_rows:
        row = program - q_rows
        head = (row // k_blocks).to(tl.int64)
        k += head % kv_heads * k_strides[1]
        if PAGE == 0:
            k += head // kv_heads * k_strides[0]
        _pool(k, pooled, table, program, row % k_blocks * BLOCK, k_len, block_table, k_strides,
              D, D_PAD, D_OUT, BLOCK, STRIDE, TOKENS, PAGE, True)  # fmt: skip
    else:
        row = program - q_rows - k_rows
        head = (row // k_blocks).to(tl.int64)
        v += head % kv_heads * v_strides[1]
        if PAGE == 0:
            v += head // kv_heads * v_strides[0]
        _measure(v, table + q_rows + k_rows, logs, row, row % k_blocks * BLOCK, k_len, block_table, v_strides,
                 weight, DV, DV_PAD, BLOCK, STRIDE, PAGE, ZSCORE)  # fmt: skip


@triton.jit
def _pool(
    x, pooled, table, row, start, length, block_table, strides,
    D: tl.constexpr, D_PAD: tl.constexpr, D_OUT: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, PAGE: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Write the means of a block's tokens by position modulo STRIDE; the last position first where REVERSED."""
    dims = tl.arange(0, D_PAD)
    x += dims.to(tl.int64)[None, :] * strides[3]
    sums = tl.zeros([TOKENS, D_PAD], tl.float32)
    for first in tl.static_range(0, BLOCK, TOKENS):
        token = (start + first + tl.arange(0, TOKENS))[:, None]
        held = (token >= 0) & (token < length)
        page = token
        if PAGE > 0:
            page = tl.load(block_table + token // PAGE, mask=held, other=0)
        at = x + token_offset(token, page, strides, PAGE)
        sums += tl.load(at, mask=held & (dims < D)[None, :], other=0.0).to(tl.float32)
    if TOKENS > STRIDE:
        sums = tl.sum(sums.reshape(TOKENS // STRIDE, STRIDE, D_PAD), 0)
    means = sums * (STRIDE / BLOCK)
    exponent = tl.max(tl.max(tl.abs(means), 1), 0).to(tl.int32, bitcast=True) >> 23  # biased by 127
    means *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(table + row, (exponent << 23).to(tl.float32, bitcast=True))
    position = tl.arange(0, STRIDE)
    if REVERSED:
        position = STRIDE - 1 - position
    at = pooled + row.to(tl.int64) * (STRIDE * D_OUT) + position[:, None] * D_OUT + dims[None, :]
    tl.store(at, means.to(pooled.dtype.element_ty), mask=(dims < D_OUT)[None, :])


@triton.jit
def _measure(
    v, values, logs, row, start, length, block_table, strides, weight,
    DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr,
    ZSCORE: tl.constexpr,
):  # fmt: skip
    """Write log(max |v| + 1e-6) of each group of STRIDE tokens, or the weighted max(0, log |v|) of the block."""
    dims = tl.arange(0, DV_PAD)
    v += dims.to(tl.int64)[None, :] * strides[3]
    groups = tl.arange(0, BLOCK // STRIDE)
    squares = tl.zeros([BLOCK // STRIDE], tl.float32)
    for position in tl.static_range(0, STRIDE):
        token = (start + groups * STRIDE + position)[:, None]
        held = token < length
        page = token
        if PAGE > 0:
            page = tl.load(block_table + token // PAGE, mask=held, other=0)
        at = v + token_offset(token, page, strides, PAGE)
        value = tl.load(at, mask=held & (dims < DV)[None, :], other=0.0).to(tl.float32)
        squares = tl.maximum(squares, tl.sum(value * value, 1))
    if ZSCORE:
        tl.store(logs + row.to(tl.int64) * (BLOCK // STRIDE) + groups, tl.log(tl.sqrt(squares) + 1e-6))
    else:
        tl.store(values + row, weight * tl.log(tl.maximum(tl.sqrt(tl.max(squares, 0)), 1.0)))


@triton.jit(do_not_specialize=["pooled_rows", "groups", "k_blocks"])
def zscore_kernel(
    logs,  # float32 [B * Hkv, Kb * PER_BLOCK], log magnitudes of groups of tokens
    table,  # float32 [pooled_rows + B * Hkv * Kb], the value term last
    pooled_rows,
    groups,  # whole groups of the sequence, at least 2; only they count
    k_blocks,
    weight,
    PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # blocks a step
):
    """Write the weighted mean over each block of the rectified z-scores over the sequence, for one head."""
    head = tl.program_id(0).to(tl.int64)
    logs += head * k_blocks * PER_BLOCK
    values = table + pooled_rows + head * k_blocks
    slots = tl.arange(0, CHUNK * PER_BLOCK)
    total = tl.zeros([CHUNK * PER_BLOCK], tl.float32)
    for start in range(0, groups, CHUNK * PER_BLOCK):
        total += tl.load(logs + start + slots, mask=start + slots < groups, other=0.0)
    mean = tl.sum(total, 0) / groups
    total = tl.zeros([CHUNK * PER_BLOCK], tl.float32)
    for start in range(0, groups, CHUNK * PER_BLOCK):
        excess = tl.load(logs + start + slots, mask=start + slots < groups, other=0.0) - mean
        total += tl.where(start + slots < groups, excess * excess, 0.0)
    deviation = tl.sqrt(tl.sum(total, 0) / (groups - 1))
    for first in range(0, k_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        slot = block[:, None] * PER_BLOCK + tl.arange(0, PER_BLOCK)[None, :]
        excess = tl.load(logs + slot, mask=slot < groups, other=0.0) - mean
        z = tl.where(slot < groups, tl.maximum(excess / (deviation + 1e-6), 0.0), 0.0)
        tl.store(values + block, tl.sum(z, 1) * (weight / PER_BLOCK), mask=block < k_blocks)


@triton.jit(do_not_specialize=["first_row", "rows", "all_rows", "q_blocks", "k_blocks", "first_block"])
def score_kernel(
    pooled,  # descriptor of [B * Hkv * group * Qb + B * Hkv * Kb, DEPTH]: all query heads of a KV head are one matrix
    table,  # float32: the power of each row of pooled, then, where VALUES, the value term of each row of k
    scores,  # float32 [B * Hkv, rows, pitch]
    factor,  # logit factor over STRIDE
    first_row,  # of the group * Qb rows of a KV head, the first to score
    rows,  # how many to score
    all_rows,  # group * Qb
    q_blocks,
    k_blocks,
    first_block,
    pitch,  # k_blocks, rounded up to a multiple of 16
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,  # rows and columns
    STEP: tl.constexpr,  # of the depth
    VALUES: tl.constexpr,
):
    """Score a tile of (query row, key block) pairs; tiles wholly in the future are left unwritten."""
    column_tiles = tl.cdiv(k_blocks, TILE)
    first_column = tl.program_id(0) % column_tiles * TILE
    first_slot = tl.program_id(0) // column_tiles * TILE
    slot = tl.arange(0, TILE)
    row = tl.minimum(first_row + first_slot + slot, all_rows - 1)
    if first_column > first_block + tl.max(row % q_blocks, 0):
        return
    head = tl.program_id(1)
    # A tile may reach into the next head's rows and columns: what it computes there is not stored.
    k_rows = tl.num_programs(1) * all_rows + head * k_blocks
    q_tile = head * all_rows + first_row + first_slot
    k_tile = k_rows + first_column
    acc = tl.zeros([TILE, TILE], tl.float32)
    for depth in tl.range(0, DEPTH, STEP):
        acc = tl.dot(pooled.load([q_tile, depth]), pooled.load([k_tile, depth]).T, acc, input_precision="ieee")
    column = tl.arange(0, TILE)
    key = k_rows + tl.minimum(first_column + column, k_blocks - 1)
    acc *= (tl.load(table + head * all_rows + row) * factor)[:, None]
    acc *= tl.load(table + key)[None, :]
    if VALUES:
        acc += tl.load(table + tl.num_programs(1) * k_blocks + key)[None, :]
    scores += (head.to(tl.int64) * rows + first_slot) * pitch + first_column
    stored = (slot < rows - first_slot)[:, None] & (column < pitch - first_column)[None, :]
    tl.store(scores + slot[:, None] * pitch + column[None, :], acc, mask=stored)


@triton.jit(
    do_not_specialize=["first_row", "all_rows", "q_blocks", "first_block", "sink", "local", "keep_stride", "width"]
)
def top_kernel(
    scores,  # float32 [B * Hkv, rows, pitch]
    keep,  # int32 [Qb], or [B, Qb] contiguous: blocks that top-k takes, clipped to the causal ones
    indices,  # int32 [B * Hkv, group * Qb, width]
    counts,  # int32 [B * Hkv, group * Qb]
    first_row,  # of the group * Qb rows, the first that scores holds
    all_rows,  # group * Qb
    q_blocks,
    first_block,
    pitch,
    sink,  # blocks
    local,  # blocks
    kv_heads,
    keep_stride,  # from one batch row to the next; 0 where they share a budget
    width,
    COLUMNS: tl.constexpr,  # a power of two, at least k_blocks
    SLOTS: tl.constexpr,  # a power of two, at least width
    INSIDE: tl.constexpr,  # forced blocks count among those that top-k takes
):
    """Write one row's kept blocks in ascending order. Equal scores go to the lower index."""
    slot = tl.program_id(0)
    row = first_row + slot
    head = tl.program_id(1).to(tl.int64)
    diagonal = first_block + row % q_blocks
    taken = tl.load(keep + head // kv_heads * keep_stride + row % q_blocks)

    # Scores become integers in the same order. The load is rounded up to whole vectors.
    column = tl.arange(0, COLUMNS)
    causal = column <= diagonal
    forced = causal & ((column < sink) | (column > diagonal - local))
    at = scores + (head * tl.num_programs(0) + slot) * pitch + column
    score = tl.load(at, mask=column < (diagonal // 16 + 1) * 16, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    key = tl.where(causal, bits ^ ((bits >> 31) & HIGHEST), LOWEST)
    if INSIDE:
        key = tl.where(forced, HIGHEST, key)

    # Bisect for the largest cutoff that at least `taken` keys reach; stop early where exactly that many do.
    low = tl.min(tl.where(causal, key, HIGHEST), 0)
    high = tl.max(tl.where(forced, LOWEST, key) if INSIDE else key, 0)
    reached = diagonal + 1
    while (low < high) & (reached != taken):
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        above = tl.sum((key >= middle).to(tl.int32), 0)
        enough = above >= taken
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
    kept = causal & (key >= low)
    if reached > taken:  # several keys equal the cutoff: the first of them fill the row
        tied = kept & (key == low)
        room = taken - (reached - tl.sum(tied.to(tl.int32), 0))
        kept = kept & ((key > low) | (tl.cumsum(tied.to(tl.int32), 0) <= room))
    if not INSIDE:
        kept = kept | forced

    flags = kept.to(tl.int32)
    count = tl.sum(flags, 0)
    out_row = head * all_rows + row
    tl.store(counts + out_row, count)
    indices += out_row * width
    tl.store(indices + tl.cumsum(flags, 0) - 1, column, mask=kept)
    rest = tl.arange(0, SLOTS)
    tl.store(indices + rest, tl.full([SLOTS], -1, tl.int32), mask=(rest >= count) & (rest < width))
