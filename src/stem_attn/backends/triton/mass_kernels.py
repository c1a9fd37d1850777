"""The kernel of the mass score: how much attention key blocks take, estimated from means of runs of tokens.

A key block has GROUPS = BLOCK / STRIDE runs, a query block Q_GROUPS = BLOCK / Q_STRIDE, and a run one vector (see
`selection_kernels.pool_kernel`). The vectors of a query block, of all query heads of a KV head, are neighbouring rows
of one matrix, so grouped heads share what is read of the keys. Those of four key blocks lie dealt out in pairs, in the
order in which tensor cores deal columns out to threads: all runs of a block are then one thread's, for a row, and no
sum over a block moves a number between threads. Logits live in the log2 domain.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from stem_attn.backends.triton.selection_kernels import finite_score
from stem_attn.backends.triton.tanh_kernel import tanh
from stem_attn.backends.triton.unfused_kernel import unfused

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)
"""The logit of what does not exist: finite, so that differences of two of them are numbers."""
UNSPECIALISED = ("first_row", "rows", "q_blocks", "q_offset", "k_len", "k_blocks", "first_block")
"""What changes from call to call: nothing is compiled anew for those that happen to be 1 or to divide by 16."""


@triton.jit(
    do_not_specialize=UNSPECIALISED,
    do_not_specialize_on_alignment=["sinks"],
)
def mass_kernel(
    queries,  # descriptor of [B * Hkv * Qb * group * Q_GROUPS + B * Hkv * Kb * GROUPS, DEPTH]: the runs of q, then
    # those of k; here Kb is rounded up to fours
    keys,  # another of the same
    table,  # float32: the power of each block of `queries`, then of `keys`, then the value term of each block of k
    sinks,  # [Hq], floating: a logit in the sum that shares are of; only where SINKS
    masses,  # float32 [B * Hkv, rows * group, pitch, Q_GROUPS]: workspace
    scores,  # float32 [B * Hkv, rows * group, pitch]; the future is garbage
    factor,  # logit factor times log2(e), not negative; over the softcap instead, where there is a tanh
    cap_log2,  # softcap times log2(e); read only where there is a tanh
    first_row,  # the first query block
    rows,  # query blocks
    group,  # query heads a KV head
    kv_heads,
    q_blocks,
    q_offset,  # tokens before q
    k_len,  # tokens
    k_blocks,
    first_block,
    pitch,  # k_blocks, rounded up to a multiple of 16
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    DEPTH: tl.constexpr,  # numbers a run
    STEP: tl.constexpr,  # as many are copied in one box
    ROWS: tl.constexpr,  # query runs a program; a power of two, at least Q_GROUPS
    COLUMNS: tl.constexpr,  # key runs a step; a power of two
    CHUNK: tl.constexpr,  # key blocks a step of the reduction
    VALUES: tl.constexpr,
    SINKS: tl.constexpr,
    TANH: tl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
    CUDA: tl.constexpr,
    CHAINED: tl.constexpr,  # it may start before its predecessor has ended, and its successor before it has
):
    """Walk ROWS query runs over the key blocks that they see; the longest walks start first.

    Writes the log of the largest share that a key block has of any run of a query block, plus its value term.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    GROUPS: tl.constexpr = BLOCK // STRIDE
    Q_GROUPS: tl.constexpr = BLOCK // Q_STRIDE
    FOURS: tl.constexpr = max(COLUMNS // (4 * GROUPS), 1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    pairs = rows * group  # of a query block and a head
    slot = tile * ROWS + tl.arange(0, ROWS)
    pair = tl.minimum(slot // Q_GROUPS, pairs - 1)
    diagonal = first_block + first_row + pair // group
    q_start = head * group * q_blocks + first_row * group
    all_q = heads * group * q_blocks
    fours = tl.cdiv(k_blocks, 4)
    k_start = all_q * Q_GROUPS + head * fours * (4 * GROUPS)
    power = tl.load(table + q_start + pair) * factor
    # The last tile may reach past the rows of this pass: what it computes there is not stored.
    q = ()
    for depth in tl.static_range(0, DEPTH, STEP):
        q += (queries.load([q_start * Q_GROUPS + tile * ROWS, depth]),)  # type: ignore[assignment]
    table += all_q
    masses += head.to(tl.int64) * pairs * pitch * Q_GROUPS
    mass_at = pair * pitch * Q_GROUPS + slot % Q_GROUPS
    stored = slot < pairs * Q_GROUPS

    # No mask where every row sees every key run, and every run is whole.
    whole = tl.minimum(tl.min(diagonal, 0) + 1, k_len // BLOCK) // 4 * (4 * GROUPS) // COLUMNS * COLUMNS
    last = (tl.max(diagonal, 0) // 4 + 1) * (4 * GROUPS)
    largest = tl.full([ROWS, FOURS, 4], NOTHING, tl.float32)
    total = tl.zeros([ROWS, FOURS, 4], tl.float32)
    part = tl.full([ROWS, FOURS, 4], NOTHING, tl.float32)
    powers = table + head * k_blocks
    for run in tl.range(0, whole, COLUMNS):
        largest, total, part = _visit(
            q, keys, powers, masses, power, diagonal, mass_at, stored, k_start, run, k_len, k_blocks, pitch, largest,
            total, part, cap_log2, GROUPS, Q_GROUPS, STRIDE, COLUMNS, False, TANH, CUDA,
        )  # fmt: skip
    for run in tl.range(whole, last, COLUMNS):
        largest, total, part = _visit(
            q, keys, powers, masses, power, diagonal, mass_at, stored, k_start, run, k_len, k_blocks, pitch, largest,
            total, part, cap_log2, GROUPS, Q_GROUPS, STRIDE, COLUMNS, True, TANH, CUDA,
        )  # fmt: skip

    peak = tl.max(tl.max(largest, 2), 1)
    total = tl.sum(tl.sum(unfused(total * tl.exp2(largest - peak[:, None, None])), 2), 1)
    whole_mass = peak + tl.log2(total)
    if SINKS:  # masses count a run of STRIDE tokens as one
        sink = tl.load(sinks + head % kv_heads * group + pair % group).to(tl.float32) * LOG2_E - tl.log2(STRIDE * 1.0)
        peak = tl.maximum(whole_mass, sink)
        whole_mass = peak + tl.log2(tl.exp2(whole_mass - peak) + tl.exp2(sink - peak))
    token = diagonal * BLOCK + slot % Q_GROUPS * Q_STRIDE
    exists = (token + Q_STRIDE > q_offset) & (token < k_len)
    whole_mass = tl.where(exists, whole_mass, float("inf"))

    PAIRS: tl.constexpr = ROWS // Q_GROUPS
    whole_mass = whole_mass.reshape(PAIRS, 1, Q_GROUPS)
    own = tl.minimum(tile * PAIRS + tl.arange(0, PAIRS), pairs - 1)
    wanted = (tl.arange(0, PAIRS) + tile * PAIRS < pairs)[:, None]
    run_of = tl.arange(0, Q_GROUPS)[None, None, :]
    values = table + heads * k_blocks + head * k_blocks
    scores += head.to(tl.int64) * pairs * pitch
    tl.debug_barrier()  # other threads wrote
    for first in tl.range(0, tl.max(diagonal, 0) + 1, CHUNK):
        column = first + tl.arange(0, CHUNK)
        written = wanted & (column < pitch)[None, :]
        at = own[:, None] * pitch + column[None, :]
        mass = tl.load(masses + at[:, :, None] * Q_GROUPS + run_of, mask=written[:, :, None], other=0.0)
        score = tl.max(mass - whole_mass, 2) * LN2
        if VALUES:
            score += tl.load(values + tl.minimum(column, k_blocks - 1))[None, :]
        tl.store(scores + at, finite_score(score), mask=written)


@triton.jit
def _visit(
    q, keys, powers, masses, power, diagonal, mass_at, stored, k_start, run, k_len, k_blocks, pitch, largest, total,
    part, cap_log2,
    GROUPS: tl.constexpr, Q_GROUPS: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    TANH: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Write the masses of the key blocks from key run `run` on, and add them to the online log-sum-exp of the rows."""
    ROWS: tl.constexpr = q[0].shape[0]
    STEP: tl.constexpr = q[0].shape[1]
    FOURS: tl.constexpr = largest.shape[1]
    WIDTH: tl.constexpr = COLUMNS // (4 * FOURS)  # runs of one block in this step
    PAIR: tl.constexpr = min(GROUPS, 2)
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part_of_depth in tl.static_range(len(q)):
        k = keys.load([k_start + run, part_of_depth * STEP])
        logits = tl.dot(q[part_of_depth], k.T, logits, input_precision="ieee")
    logits = logits.reshape(ROWS, FOURS, WIDTH // PAIR, 4, PAIR)
    four = run // (4 * GROUPS) + tl.arange(0, FOURS)
    block = four[:, None] * 4 + tl.arange(0, 4)[None, :]
    weight = power[:, None, None] * tl.load(powers + tl.minimum(block, k_blocks - 1))[None, :, :]
    if MASKED or TANH != "none":
        logits *= weight[:, :, None, :, None]
        if TANH != "none":
            logits = tanh(logits, TANH) * cap_log2
        if MASKED:
            pair = run % (4 * GROUPS) // 4 + tl.arange(0, WIDTH // PAIR) * PAIR
            number = pair[:, None, None] + tl.arange(0, PAIR)[None, None, :]  # of a run in its block
            tokens = k_len - (block[:, None, :, None] * GROUPS + number[None]) * STRIDE  # from the run's first one on
            seen = (block[None] <= diagonal[:, None, None])[:, :, None, :, None]
            logits += _log2(tl.minimum(tl.maximum(tokens, 1), STRIDE).to(tl.float32) / STRIDE, CUDA)[None]
            logits = tl.where((tokens > 0)[None] & seen, logits, NOTHING)
        peak = tl.max(tl.max(logits, 4), 2)
        logits -= peak[:, :, None, :, None]
    else:
        peak = tl.max(tl.max(logits, 4), 2) * weight
        logits = logits * weight[:, :, None, :, None] - peak[:, :, None, :, None]
    mass = tl.sum(tl.sum(tl.exp2(logits), 4), 2)
    mass = peak + _log2(mass, CUDA)
    new = tl.maximum(largest, mass)
    total = total * tl.exp2(largest - new) + tl.exp2(mass - new)
    if WIDTH < GROUPS:  # a block takes several steps, and the last of them leaves its sum
        part = tl.where(run % (4 * GROUPS) == 0, NOTHING, part)
        peak = tl.maximum(part, mass)
        mass = peak + _log2(tl.exp2(part - peak) + tl.exp2(mass - peak), CUDA)
        part = mass
    mask = stored[:, None, None]
    if MASKED:
        mask = mask & (block < pitch)[None]
    tl.store(masses + mass_at[:, None, None] + block[None] * Q_GROUPS, mass, mask=mask)
    return new, total, part


@triton.jit
def _log2(x, CUDA: tl.constexpr):
    """Take a logarithm: Triton's has 25 instructions, the GPU's one, with an error of 2^-22."""
    return libdevice.fast_log2f(x) if CUDA else tl.log2(x)
