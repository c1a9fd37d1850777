"""The kernels of the mass score: how much attention key blocks take, estimated from means of runs of tokens.

A key block has GROUPS = BLOCK / STRIDE runs, a query block Q_GROUPS = BLOCK / Q_STRIDE, and a run one vector (see
`selection_kernels.pool_kernel`). The vectors of a query block, of all query heads of a KV head, are neighbouring rows
of one matrix, so grouped heads share what is read of the keys. Logits live in the log2 domain.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from stem_attn.backends.triton.selection_kernels import finite_score
from stem_attn.backends.triton.tanh_kernel import tanh

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)
"""The logit of what does not exist: finite, so that differences of two of them are numbers."""


@triton.jit(do_not_specialize=["first_row", "rows", "q_blocks", "k_len", "k_blocks", "first_block"])
def mass_kernel(
    queries,  # descriptor of [B * Hkv * Qb * group * Q_GROUPS + B * Hkv * Kb * GROUPS, DEPTH]: the runs of q, then of k
    keys,  # another of the same
    table,  # float32: the power of each block of `queries`, then of `keys`
    masses,  # float32 [B * Hkv, rows * group * Q_GROUPS, pitch]: log2-sum-exp of each key block; the future is garbage
    totals,  # float32 [B * Hkv, rows * group * Q_GROUPS]: log2-sum-exp of the causal key blocks
    factor,  # logit factor times log2(e); over the softcap instead, where there is a tanh
    cap_log2,  # softcap times log2(e); read only where there is a tanh
    first_row,  # the first query block
    rows,  # query blocks
    group,  # query heads a KV head
    q_blocks,
    k_len,  # tokens
    k_blocks,
    first_block,
    pitch,  # k_blocks, rounded up to a multiple of 16
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    DEPTH: tl.constexpr,  # numbers a run
    STEP: tl.constexpr,  # as many are copied in one box
    ROWS: tl.constexpr,  # query runs a program; a power of two
    COLUMNS: tl.constexpr,  # key runs a step; a power of two
    TANH: tl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
    CUDA: tl.constexpr,
):
    """Walk ROWS query runs over the key blocks that they see; the longest walks start first."""
    GROUPS: tl.constexpr = BLOCK // STRIDE
    Q_GROUPS: tl.constexpr = BLOCK // Q_STRIDE
    BLOCKS: tl.constexpr = max(COLUMNS // GROUPS, 1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    held = rows * group * Q_GROUPS
    slot = tile * ROWS + tl.arange(0, ROWS)
    q_block = first_row * group + tl.minimum(slot, held - 1) // Q_GROUPS  # counts (query block, head) pairs
    diagonal = first_block + q_block // group
    q_start = head * group * q_blocks
    all_q = tl.num_programs(1) * group * q_blocks
    k_start = all_q * Q_GROUPS + head * k_blocks * GROUPS
    power = tl.load(table + q_start + q_block) * factor
    # The last tile may reach past the rows of this pass: what it computes there is not stored.
    q = ()
    for depth in tl.static_range(0, DEPTH, STEP):
        q += (queries.load([(q_start + first_row * group) * Q_GROUPS + tile * ROWS, depth]),)  # type: ignore[assignment]
    table += all_q + head * k_blocks
    masses += (head.to(tl.int64) * held + slot)[:, None] * pitch
    stored = slot < held

    # No mask where every row sees every key run, and every run is whole.
    seen = tl.minimum((tl.min(diagonal, 0) + 1) * GROUPS, k_len // STRIDE) // COLUMNS * COLUMNS
    last = tl.minimum((tl.max(diagonal, 0) + 1) * GROUPS, tl.cdiv(k_len, STRIDE))
    largest = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    part = tl.full([ROWS, BLOCKS], NOTHING, tl.float32)
    for run in tl.range(0, seen, COLUMNS):
        largest, total, part = _visit(
            q, keys, table, masses, power, diagonal, stored, k_start, run, k_len, k_blocks, pitch, largest, total, part,
            cap_log2, GROUPS, STRIDE, BLOCKS, COLUMNS, False, TANH, CUDA,
        )  # fmt: skip
    for run in tl.range(seen, last, COLUMNS):
        largest, total, part = _visit(
            q, keys, table, masses, power, diagonal, stored, k_start, run, k_len, k_blocks, pitch, largest, total, part,
            cap_log2, GROUPS, STRIDE, BLOCKS, COLUMNS, True, TANH, CUDA,
        )  # fmt: skip
    tl.store(totals + head.to(tl.int64) * held + slot, largest + tl.log2(total), mask=stored)


@triton.jit
def _visit(
    q, keys, table, masses, power, diagonal, stored, k_start, run, k_len, k_blocks, pitch, largest, total, part,
    cap_log2,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    TANH: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Write the masses of the key blocks from key run `run` on, and add them to the online log-sum-exp of the rows."""
    ROWS: tl.constexpr = q[0].shape[0]
    STEP: tl.constexpr = q[0].shape[1]
    WIDTH: tl.constexpr = COLUMNS // BLOCKS  # runs of one block in this step
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part_of_depth in tl.static_range(len(q)):
        k = keys.load([k_start + run, part_of_depth * STEP])
        logits = tl.dot(q[part_of_depth], k.T, logits, input_precision="ieee")
    logits = logits.reshape(ROWS, BLOCKS, WIDTH)
    block = run // GROUPS + tl.arange(0, BLOCKS)
    powers = tl.load(table + tl.minimum(block, k_blocks - 1))
    logits *= (power[:, None] * powers[None, :])[:, :, None]
    if TANH != "none":
        logits = tanh(logits, TANH) * cap_log2
    if MASKED:
        column = run + tl.arange(0, COLUMNS).reshape(1, BLOCKS, WIDTH)
        tokens = k_len - column * STRIDE  # from the run's first one on
        logits += tl.log2(tl.minimum(tl.maximum(tokens, 1), STRIDE).to(tl.float32) / STRIDE)
        logits = tl.where((tokens > 0) & (column // GROUPS <= diagonal[:, None, None]), logits, NOTHING)
    peak = tl.max(logits, 2)
    mass = tl.sum(tl.exp2(logits - peak[:, :, None]), 2)
    # Triton's logarithm takes 25 instructions; of the instruction, error 2^-22, a quarter of the step is saved.
    mass = peak + (libdevice.fast_log2f(mass) if CUDA else tl.log2(mass))
    new = tl.maximum(largest, tl.max(mass, 1))
    total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(mass - new[:, None]), 1)
    if WIDTH < GROUPS:  # a block takes several steps, and the last of them leaves its sum
        part = tl.where(run % GROUPS == 0, NOTHING, part)
        peak = tl.maximum(part, mass)
        mass = peak + tl.log2(tl.exp2(part - peak) + tl.exp2(mass - peak))
        part = mass
    mask = stored[:, None]
    if MASKED:
        mask = mask & (block < pitch)[None, :]
    tl.store(masses + block[None, :], mass, mask=mask)
    return new, total, part


@triton.jit(
    do_not_specialize=["first_row", "q_blocks", "q_offset", "k_len", "k_blocks", "first_block"],
    do_not_specialize_on_alignment=["sinks"],
)
def reduce_kernel(
    masses,  # as `mass_kernel` wrote them
    totals,
    table,  # float32, the value term of each key block last; only where VALUES
    sinks,  # [Hq], floating: a logit in the sum that shares are of; only where SINKS
    scores,  # float32 [B * Hkv, rows * group, pitch]
    first_row,  # the first query block
    group,  # query heads a KV head
    kv_heads,
    q_blocks,
    q_offset,  # tokens before q
    k_len,
    k_blocks,
    first_block,
    pitch,
    BLOCK: tl.constexpr,
    LOG2_STRIDE: tl.constexpr,  # of the tokens a key run
    Q_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,  # columns; a power of two
    VALUES: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write the log of the largest share that a key block has of any query run, plus its value term."""
    Q_GROUPS: tl.constexpr = BLOCK // Q_STRIDE
    slot = tl.program_id(0)
    head = tl.program_id(1)
    diagonal = first_block + first_row + slot // group
    first_column = tl.program_id(2) * CHUNK
    if first_column > diagonal:
        return
    column = first_column + tl.arange(0, CHUNK)
    held = column < (diagonal // 16 + 1) * 16  # whole vectors
    row = head.to(tl.int64) * tl.num_programs(0) + slot
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    if SINKS:  # masses count a run of STRIDE tokens as one
        sink = tl.load(sinks + head % kv_heads * group + slot % group).to(tl.float32) * LOG2_E - LOG2_STRIDE
    for run in tl.static_range(Q_GROUPS):
        token = diagonal * BLOCK + run * Q_STRIDE
        exists = (token + Q_STRIDE > q_offset) & (token < k_len)
        total = tl.load(totals + row * Q_GROUPS + run)
        if SINKS:
            peak = tl.maximum(total, sink)
            total = peak + tl.log2(tl.exp2(total - peak) + tl.exp2(sink - peak))
        total = tl.where(exists, total, float("inf"))
        mass = tl.load(masses + (row * Q_GROUPS + run) * pitch + column, mask=held, other=0.0)
        best = tl.maximum(best, mass - total)
    score = best * LN2
    if VALUES:
        values = table + tl.num_programs(1) * (group * q_blocks + k_blocks) + head * k_blocks
        score += tl.load(values + tl.minimum(column, k_blocks - 1))
    tl.store(scores + row * pitch + column, finite_score(score), mask=held)
