"""The selection kernels: pool q, k and v; standardise magnitudes; score block pairs; keep the best of each row.

Scores come from pooled blocks (see `stem_attn.scoring`): SLOTS means of tokens a block. Those of q lie ordered by KV
head, query block, and query head of the KV head, so that neighbouring rows see the same keys. A pooled block is stored
divided by the power of two just below its largest magnitude, and that power in a table of its own. So float16 holds
the means of 16-bit inputs with 11 significant bits whatever their range: the precision of TF32 at half the bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from stem_attn.backends.triton.kernel_pages import page_of, token_offset
from stem_attn.backends.triton.tanh_kernel import tanh

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
LARGEST_SCORE = tl.constexpr(1e38)
"""Of a block that is not forced. Its negative is what ranks last: infinities stand for forced blocks and the future."""
# Spreads are squares of what means are. Keys' are stored with this factor and queries' with its inverse in their
# weight, so that both stay within float16's range of their block's means for magnitudes from 1e-3 to 1e4.
BALANCE = tl.constexpr(1 / 16)


@triton.jit(
    do_not_specialize=["q_offset", "q_len", "k_len", "q_blocks", "k_blocks"],
    do_not_specialize_on_alignment=["block_table"],
)
def pool_kernel(
    q,  # [B, Hq, Tq, D], the last Tq of Tk tokens
    k,  # [B, Hkv, Tk, D]; [pages, Hkv, PAGE, D] where paged, and then B = 1
    v,  # [B, Hkv, Tk, DV], likewise
    pooled,  # [B * Hkv * Qb * group * (slots of q) + B * Hkv * Kb * (slots of k), D_OUT]: the blocks of q, then those
    # of k; zeros past D, or where SPREAD, ceil(D / 2) spreads, then zeros. Where RUNS, Kb is rounded up to fours
    table,  # float32: the power of each block of pooled, then the weighted value term of each block of k
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
    spread,  # weight of the spread in units of the dot product of means; read only where SPREAD
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    D_OUT: tl.constexpr,  # a multiple of 8, less than 8 more than what it holds
    SPREAD: tl.constexpr,  # with RUNS: keep the variance of each pair of dims of k, and the squared mean of q's
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,  # that of q: a multiple where RUNS, else the same
    RUNS: tl.constexpr,  # average each run of STRIDE tokens; else the tokens of each position modulo STRIDE
    TOKENS: tl.constexpr,  # how many are loaded at once; a multiple of SLOTS: BLOCK / STRIDE where RUNS, else STRIDE
    PAGE: tl.constexpr,  # tokens a page of k and v; 0: not paged
    ZSCORE: tl.constexpr,
    CHAINED: tl.constexpr,  # the next kernel may start before this one has ended
):
    """Pool one block of q or k, or measure one block of v."""
    if CHAINED:
        gdc_launch_dependents()
    program = tl.program_id(0)
    q_rows = batch_heads * q_blocks
    k_rows = batch_kv_heads * k_blocks
    if program < q_rows:
        head = (program // q_blocks).to(tl.int64)
        q += head // (kv_heads * group) * q_strides[0] + head % (kv_heads * group) * q_strides[1]
        block = program % q_blocks
        row = (program // q_blocks // group * q_blocks + block) * group + program // q_blocks % group
        _pool(q, pooled, table + row, row, 0, block * BLOCK - q_offset, q_len, block_table, q_strides, spread,
              D, D_PAD, D_OUT, SPREAD, BLOCK, Q_STRIDE, RUNS, TOKENS, 0, False)  # fmt: skip
    elif program < q_rows + k_rows:
        row = program - q_rows
        head = (row // k_blocks).to(tl.int64)
        k += head % kv_heads * k_strides[1]
        if PAGE == 0:
            k += head // kv_heads * k_strides[0]
        pooled += q_rows.to(tl.int64) * ((BLOCK // Q_STRIDE if RUNS else STRIDE) * D_OUT)
        block = row % k_blocks
        place = row
        if RUNS:
            place = row // k_blocks * (tl.cdiv(k_blocks, 4) * 4) + block
        _pool(k, pooled, table + q_rows + row, place, block, block * BLOCK, k_len, block_table, k_strides, spread,
              D, D_PAD, D_OUT, SPREAD, BLOCK, STRIDE, RUNS, TOKENS, PAGE, True)  # fmt: skip
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
    x, pooled, power, place, block, start, length, block_table, strides, spread,
    D: tl.constexpr, D_PAD: tl.constexpr, D_OUT: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, RUNS: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the means of a block's tokens, by run or by position, the last position of keys first.

    Tokens that the block lacks count as zeros in the mean of a position, and not at all in that of a run.
    """
    SLOTS: tl.constexpr = BLOCK // STRIDE if RUNS else STRIDE
    slot = tl.arange(0, SLOTS)
    HALF: tl.constexpr = (D + 1) // 2
    dims = tl.arange(0, D_PAD)
    real = dims < D
    if SPREAD and D < D_PAD:  # either half of D in its half of D_PAD
        real = dims % (D_PAD // 2) < HALF
        dims = dims // (D_PAD // 2) * HALF + dims % (D_PAD // 2)
        real = real & (dims < D)
    x += dims.to(tl.int64)[None, :] * strides[3]
    sums = tl.zeros([TOKENS, D_PAD], tl.float32)
    squares = tl.zeros([TOKENS, D_PAD], tl.float32)
    for first in tl.static_range(0, BLOCK, TOKENS):
        turn = first + tl.arange(0, TOKENS)
        if RUNS:  # one token of each run after the other, so that a thread's sums stay its own
            turn = turn % SLOTS * STRIDE + turn // SLOTS
        token = (start + turn)[:, None]
        held = (token >= 0) & (token < length)
        page = page_of(block_table, token, held, PAGE)
        at = x + token_offset(token, page, strides, PAGE)
        token_value = tl.load(at, mask=held & real[None, :], other=0.0).to(tl.float32)
        sums += token_value
        if SPREAD and KEYS:
            squares += token_value * token_value
    if TOKENS > SLOTS:
        sums = tl.sum(sums.reshape(TOKENS // SLOTS, SLOTS, D_PAD), 0)
    if RUNS:
        token = start + slot * STRIDE
        tokens = tl.minimum(token + STRIDE, length) - tl.maximum(token, 0)
        tokens = tl.maximum(tokens, 1).to(tl.float32)[:, None]
        means = sums / tokens
    else:
        means = sums * (STRIDE / BLOCK)
    largest = tl.max(tl.max(tl.abs(means), 1), 0)
    if SPREAD:
        if KEYS:
            if TOKENS > SLOTS:
                squares = tl.sum(squares.reshape(TOKENS // SLOTS, SLOTS, D_PAD), 0)
            spreads = tl.maximum(squares / tokens - means * means, 0.0) * BALANCE
        else:
            # The maximum changes nothing. Without it the factor is fused into the sum below, once from either side, and
            # threads that hold the same sum hold different last bits of it.
            spreads = tl.maximum(means * means * (spread / BALANCE), 0.0)
        spreads = tl.sum(spreads.reshape(SLOTS, 2, D_PAD // 2), 1)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(spreads), 1), 0))
    exponent = largest.to(tl.int32, bitcast=True) >> 23  # biased by 127
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(power, (exponent << 23).to(tl.float32, bitcast=True))
    if KEYS and RUNS:
        PAIR: tl.constexpr = min(SLOTS, 2)
        place -= block % 4  # the first of four
        slot = (slot // PAIR * 4 + block % 4) * PAIR + slot % PAIR
    elif KEYS:
        slot = SLOTS - 1 - slot
    at = pooled + place.to(tl.int64) * (SLOTS * D_OUT) + slot[:, None] * D_OUT
    tl.store(at + dims[None, :], (means * inverse).to(pooled.dtype.element_ty), mask=real[None, :])
    USED: tl.constexpr = D + HALF if SPREAD else D
    if SPREAD:
        pair = tl.arange(0, D_PAD // 2)[None, :]
        tl.store(at + D + pair, (spreads * inverse).to(pooled.dtype.element_ty), mask=pair < HALF)
    if D_OUT > USED:
        rest = USED + tl.arange(0, 8)[None, :]
        tl.store(at + rest, tl.zeros([SLOTS, 8], pooled.dtype.element_ty), mask=rest < D_OUT)


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
        page = page_of(block_table, token, held, PAGE)
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


@triton.jit
def ordered(score):
    """Map scores to integers in the same order; -0 equals 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & HIGHEST)


@triton.jit
def number(key):
    """Map an integer of `ordered` back to its score."""
    return (key ^ ((key >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def finite_score(score):
    """Bring what is no number, or too large a one, into the range of scores; a NaN ranks last."""
    return tl.minimum(tl.maximum(score, -LARGEST_SCORE), LARGEST_SCORE)  # of a NaN and a number the number


@triton.jit(do_not_specialize=["first_row", "rows", "all_rows", "k_blocks", "first_block"])
def score_kernel(
    pooled,  # descriptor of [B * Hkv * Qb * group + B * Hkv * Kb, DEPTH]: all query heads of a KV head are one matrix
    table,  # float32: the power of each row of pooled, then, where VALUES, the value term of each row of k
    scores,  # float32 [B * Hkv, rows, pitch]
    factor,  # logit factor over STRIDE; over the softcap too, where there is a tanh
    softcap,  # read only where there is a tanh
    first_row,  # of the Qb * group rows of a KV head, the first to score
    rows,  # how many to score
    all_rows,  # Qb * group
    group,  # query heads a KV head
    k_blocks,
    first_block,
    pitch,  # k_blocks, rounded up to a multiple of 16
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,  # rows and columns
    STEP: tl.constexpr,  # of the depth
    VALUES: tl.constexpr,
    TANH: tl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
):
    """Score a tile of (query row, key block) pairs; tiles wholly in the future are left unwritten."""
    column_tiles = tl.cdiv(k_blocks, TILE)
    first_column = tl.program_id(0) % column_tiles * TILE
    first_slot = tl.program_id(0) // column_tiles * TILE
    slot = tl.arange(0, TILE)
    row = tl.minimum(first_row + first_slot + slot, all_rows - 1)
    if first_column > first_block + tl.max(row, 0) // group:
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
    if TANH != "none":
        acc = tanh(acc, TANH) * softcap
    if VALUES:
        acc += tl.load(table + tl.num_programs(1) * k_blocks + key)[None, :]
    acc = finite_score(acc)
    scores += (head.to(tl.int64) * rows + first_slot) * pitch + first_column
    stored = (slot < rows - first_slot)[:, None] & (column < pitch - first_column)[None, :]
    tl.store(scores + slot[:, None] * pitch + column[None, :], acc, mask=stored)


@triton.jit(do_not_specialize=["first_row", "q_blocks", "first_block", "sink", "local", "keep_stride", "width"])
def top_kernel(
    scores,  # float32 [B * Hkv, rows * group, pitch]; finite
    keep,  # int32 [n], or [B, n], of the whole prompt: blocks that top-k takes, clipped to the causal ones; not read
    # if SHARED
    indices,  # int32 [B * Hkv, group, Qb, width]
    counts,  # int32 [B * Hkv, group, Qb]; if SHARED it says what top-k takes
    keep_stride,  # from one batch row to the next; 0 where they share a budget
    width,
    first_row,  # the first query block that scores holds
    group,  # query heads a KV head
    q_blocks,
    first_block,
    pitch,
    sink,  # blocks
    local,  # blocks
    kv_heads,
    COLUMNS: tl.constexpr,  # a power of two, at least k_blocks
    INSIDE: tl.constexpr,  # forced blocks count among those that top-k takes
    SHARED: tl.constexpr,  # heads share their budgets
):
    """Write one row's kept blocks in ascending order. Equal scores go to the lower index."""
    slot = tl.program_id(0)
    row = first_row + slot // group
    head = tl.program_id(1).to(tl.int64)
    diagonal = first_block + row
    out_row = (head * group + slot % group) * q_blocks + row
    if SHARED:
        taken = tl.load(counts + out_row)
    else:
        taken = tl.load(keep + head // kv_heads * keep_stride + diagonal)

    # The load is rounded up to whole vectors.
    column = tl.arange(0, COLUMNS)
    causal = column <= diagonal
    forced = causal & ((column < sink) | (column > diagonal - local))
    at = scores + (head * tl.num_programs(0) + slot) * pitch + column
    score = tl.load(at, mask=column < (diagonal // 16 + 1) * 16, other=0.0)
    key = tl.where(causal, ordered(score), LOWEST)
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
    tl.store(counts + out_row, count)
    indices += out_row * width
    tl.store(indices + tl.cumsum(flags, 0) - 1, column, mask=kept)
    tl.store(indices + column, tl.full([COLUMNS], -1, tl.int32), mask=(column >= count) & (column < width))
