"""The kernel of the mass score for Hopper, in Gluon: one warp loads, several warpgroups compute.

It computes what `mass_kernels.mass_kernel` does, which says what runs, blocks and masses are. Every consumer warpgroup
takes 64 query runs and walks over the key runs at its own pace, so that the tensor cores work for one of them while
others exponentiate; all share the tiles of keys that the producer warp loads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from stem_attn.backends.triton.hopper_kernel import load_box, warpgroup_barrier
from stem_attn.backends.triton.mass_kernels import LN2, LOG2_E, NOTHING, UNSPECIALISED
from stem_attn.backends.triton.selection_kernels import finite_score
from stem_attn.backends.triton.store_kernel import store_in_place
from stem_attn.backends.triton.tanh_kernel import tanh
from stem_attn.backends.triton.unfused_kernel import unfused

HALF = gl.constexpr(64)  # query runs a warpgroup
ROWS = gl.constexpr(128)  # those of a program
STEP = gl.constexpr(64)  # numbers of 16 bits in a row of shared memory, 128 bytes


def box_layout(rows: int) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of a 16-bit box [rows, 64]."""
    return gl.NVMMASharedLayout.get_default_for([rows, STEP.value], gl.float16)


@gluon.jit(
    do_not_specialize=UNSPECIALISED,
    do_not_specialize_on_alignment=["sinks"],
)
def hopper_mass_kernel(
    queries,  # descriptor as of `mass_kernel`, boxes [64, 64]
    keys,  # another of the same, boxes [COLUMNS, 64]
    table,
    sinks,
    masses,
    scores,
    factor,
    cap_log2,
    first_row,
    rows,
    group,
    kv_heads,
    q_blocks,
    q_offset,
    k_len,
    k_blocks,
    first_block,
    pitch,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,  # key runs a step, at least four blocks
    STAGES: gl.constexpr,
    VALUES: gl.constexpr,
    SINKS: gl.constexpr,
    TANH: gl.constexpr,
    CHAINED: gl.constexpr,
):
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    GROUPS: gl.constexpr = BLOCK // STRIDE
    Q_GROUPS: gl.constexpr = BLOCK // Q_STRIDE
    BOXES: gl.constexpr = (DEPTH + STEP - 1) // STEP
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    head = gl.program_id(1)
    heads = gl.num_programs(1)
    pairs = rows * group
    q_start = head * group * q_blocks + first_row * group
    all_q = heads * group * q_blocks
    k_start = all_q * Q_GROUPS + head * ((k_blocks + 4 - 1) // 4) * (4 * GROUPS)
    first_diagonal = first_block + first_row + gl.minimum(tile * ROWS // Q_GROUPS, pairs - 1) // group
    last_diagonal = first_block + first_row + gl.minimum((tile * ROWS + ROWS - 1) // Q_GROUPS, pairs - 1) // group
    whole = gl.minimum(first_diagonal + 1, k_len // BLOCK) // 4 * (4 * GROUPS) // COLUMNS
    steps = ((last_diagonal // 4 + 1) * (4 * GROUPS) + COLUMNS - 1) // COLUMNS

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, STEP], gl.float16)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, STEP], gl.float16)
    q_tiles = gl.allocate_shared_memory(gl.float16, [2 * BOXES, HALF, STEP], q_layout)
    k_tiles = gl.allocate_shared_memory(gl.float16, [STAGES * BOXES, COLUMNS, STEP], k_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
    fence_async_shared()

    tiles = (q_tiles, k_tiles)
    barriers = (q_full, k_full, k_free)
    values = table + all_q + (heads + head) * k_blocks
    at = (
        table + q_start,
        table + all_q + head * k_blocks,
        values,
        (sinks + head % kv_heads * group,) if SINKS else (),
        masses + head.to(gl.int64) * pairs * pitch * Q_GROUPS,
        scores + head.to(gl.int64) * pairs * pitch,
    )
    geometry = (tile, pairs, group, q_offset, k_len, k_blocks, first_block + first_row, pitch, whole, steps)
    numbers = (factor, (cap_log2,) if TANH != "none" else ())
    shared = (tiles, barriers, at, geometry, numbers)
    source = (queries, keys, q_start * Q_GROUPS + tile * ROWS, k_start, steps)
    gl.warp_specialize(
        [
            (_consume, (0, shared, BLOCK, STRIDE, Q_STRIDE, STAGES, VALUES, SINKS, TANH)),
            (_consume, (1, shared, BLOCK, STRIDE, Q_STRIDE, STAGES, VALUES, SINKS, TANH)),
            (_produce, (source, tiles, barriers, BOXES, STAGES)),
        ],
        [4, 1],
        [216, 24],
    )


@gluon.jit
def _produce(source, tiles, barriers, BOXES: gl.constexpr, STAGES: gl.constexpr):
    """Copy the query runs once, then the key runs in ascending order."""
    queries, keys, q_row, k_row, steps = source
    q_tiles, k_tiles = tiles
    q_full, k_full, k_free = barriers
    COLUMNS: gl.constexpr = k_tiles.type.shape[1]
    mbarrier.expect(q_full.index(0), 2 * BOXES * queries.block_type.nbytes)
    for part in gl.static_range(2):
        for box in gl.static_range(BOXES):
            load_box(queries, [q_row + part * HALF, box * STEP], q_full.index(0), q_tiles.index(part * BOXES + box))
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(k_free.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), BOXES * keys.block_type.nbytes)
        for box in gl.static_range(BOXES):
            at = [k_row + step * COLUMNS, box * STEP]
            load_box(keys, at, k_full.index(slot), k_tiles.index(slot * BOXES + box))


@gluon.jit
def _multiply(queries, step, tiles, barriers, zeros, STAGES: gl.constexpr):
    """Issue the products of a warpgroup's query runs and a step's key runs."""
    BOXES: gl.constexpr = len(queries)
    slot = step % STAGES
    mbarrier.wait(barriers[1].index(slot), step // STAGES & 1)
    logits = zeros
    for box in gl.static_range(BOXES):
        key = tiles[1].index(slot * BOXES + box).permute((1, 0))
        logits = warpgroup_mma(queries[box], key, logits, use_acc=box > 0, is_async=True)
    return logits


@gluon.jit
def _consume(
    part,
    shared,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
    VALUES: gl.constexpr,
    SINKS: gl.constexpr,
    TANH: gl.constexpr,
):
    """Walk 64 query runs over the key blocks; then write the scores of their query blocks."""
    tiles, barriers, at, geometry, numbers = shared
    q_full, _, _ = barriers
    q_powers, k_powers, values, sink_at, masses, scores = at
    tile, pairs, group, q_offset, k_len, k_blocks, first_block, pitch, whole, steps = geometry
    factor, cap_log2 = numbers
    COLUMNS: gl.constexpr = tiles[1].type.shape[1]
    BOXES: gl.constexpr = tiles[1].type.shape[0] // STAGES
    GROUPS: gl.constexpr = BLOCK // STRIDE
    Q_GROUPS: gl.constexpr = BLOCK // Q_STRIDE
    FOURS: gl.constexpr = COLUMNS // (4 * GROUPS)
    PAIR: gl.constexpr = min(GROUPS, 2)

    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    zeros = gl.zeros([HALF, COLUMNS], gl.float32, product)
    shaped = zeros.reshape([HALF, FOURS, GROUPS // PAIR, 4, PAIR])
    full: gl.constexpr = shaped.type.layout
    by_block: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, full))  # [HALF, FOURS, 4]
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, by_block))

    slot = tile * ROWS + part * HALF + gl.arange(0, HALF, layout=by_row)
    pair = gl.minimum(slot // Q_GROUPS, pairs - 1)
    diagonal = (first_block + pair // group)[:, None, None]
    power = (gl.load(q_powers + pair) * factor)[:, None, None]
    stored = (slot < pairs * Q_GROUPS)[:, None, None]
    mass_at = (pair * (pitch * Q_GROUPS) + slot % Q_GROUPS)[:, None, None]
    four = gl.arange(0, FOURS, layout=gl.SliceLayout(0, gl.SliceLayout(2, by_block)))[None, :, None]
    own = four * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, by_block)))[None, None, :]
    turn: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, full))))
    even: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, full))))
    number = gl.arange(0, GROUPS // PAIR, layout=turn)[None, None, :, None, None] * PAIR
    number = number + gl.arange(0, PAIR, layout=even)[None, None, None, None, :]  # of a run in its block
    largest = gl.full([HALF, FOURS, 4], NOTHING, gl.float32, by_block)
    total = gl.zeros([HALF, FOURS, 4], gl.float32, by_block)

    rows = (diagonal, power, stored, mass_at)
    bounds = (k_len, k_blocks, pitch)
    columns = (own, number)
    outputs = (k_powers, masses)
    mbarrier.wait(q_full.index(0), 0)
    queries = ()
    for box in gl.static_range(BOXES):
        queries += (tiles[0].index(part * BOXES + box).load(gl.DotOperandLayout(0, product, 2)),)  # type: ignore[assignment]

    logits = _wait(_multiply(queries, 0, tiles, barriers, zeros, STAGES), 0, barriers, STAGES)
    # A step's products run while the last one's are digested: two steps a turn, so that logits stay in their registers.
    plain = gl.minimum(whole, steps - 1) // 2 * 2
    for step in range(0, plain, 2):
        coming = _multiply(queries, step + 1, tiles, barriers, zeros, STAGES)
        largest, total = _digest(
            logits, step, largest, total, rows, bounds, columns, outputs, cap_log2,
            GROUPS, Q_GROUPS, STRIDE, False, TANH,
        )  # fmt: skip
        coming = _wait(coming, step + 1, barriers, STAGES)
        logits = _multiply(queries, step + 2, tiles, barriers, zeros, STAGES)
        largest, total = _digest(
            coming, step + 1, largest, total, rows, bounds, columns, outputs, cap_log2,
            GROUPS, Q_GROUPS, STRIDE, False, TANH,
        )  # fmt: skip
        logits = _wait(logits, step + 2, barriers, STAGES)
    for step in range(plain, steps):
        largest, total = _digest(
            logits, step, largest, total, rows, bounds, columns, outputs, cap_log2,
            GROUPS, Q_GROUPS, STRIDE, True, TANH,
        )  # fmt: skip
        if step + 1 < steps:
            logits = _wait(_multiply(queries, step + 1, tiles, barriers, zeros, STAGES), step + 1, barriers, STAGES)

    peak = gl.max(gl.max(largest, 2), 1)
    total = gl.sum(gl.sum(unfused(total * gl.exp2(largest - peak[:, None, None])), 2), 1)
    whole_mass = peak + gl.log2(total)
    if SINKS:  # masses count a run of STRIDE tokens as one
        sink = gl.load(sink_at[0] + pair % group).to(gl.float32) * LOG2_E - gl.log2(gl.full_like(peak, STRIDE))
        peak = gl.maximum(whole_mass, sink)
        whole_mass = peak + gl.log2(gl.exp2(whole_mass - peak) + gl.exp2(sink - peak))
    token = (first_block + pair // group) * BLOCK + slot % Q_GROUPS * Q_STRIDE
    exists = (token + Q_STRIDE > q_offset) & (token < k_len)
    whole_mass = gl.where(exists, whole_mass, float("inf"))

    PAIRS: gl.constexpr = HALF // Q_GROUPS
    VECTOR: gl.constexpr = min(Q_GROUPS, 4)
    CHUNK: gl.constexpr = 32
    wide: gl.constexpr = gl.BlockedLayout(
        [1, 1, VECTOR], [1, 32 * VECTOR // Q_GROUPS, Q_GROUPS // VECTOR], [4, 1, 1], [2, 1, 0]
    )
    narrow: gl.constexpr = gl.SliceLayout(2, wide)
    whole_mass = gl.convert_layout(whole_mass.reshape([PAIRS, 1, Q_GROUPS]), wide)
    number = tile * (ROWS // Q_GROUPS) + part * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, narrow))
    wanted = (number < pairs)[:, None]
    run = gl.arange(0, Q_GROUPS, layout=gl.SliceLayout(0, gl.SliceLayout(1, wide)))[None, None, :]
    warpgroup_barrier()  # other threads wrote
    last = first_block + gl.minimum(gl.max(number, 0), pairs - 1) // group
    for first in range(0, last + 1, CHUNK):
        column = first + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, narrow))
        written = wanted & (column < pitch)[None, :]
        place = gl.minimum(number, pairs - 1)[:, None] * pitch + column[None, :]
        mass = gl.load(masses + (place[:, :, None] * Q_GROUPS + run), mask=written[:, :, None], other=0.0)
        score = gl.max(mass - whole_mass, 2) * LN2
        if VALUES:
            score += gl.load(values + gl.minimum(column, k_blocks - 1))[None, :]
        gl.store(scores + place, finite_score(score), mask=written)


@gluon.jit
def _wait(logits, step, barriers, STAGES: gl.constexpr):
    """Wait for a step's products, and give its slot of the ring back."""
    _, _, k_free = barriers
    logits = warpgroup_mma_wait(0, deps=(logits,))
    warpgroup_barrier()
    mbarrier.arrive(k_free.index(step % STAGES), count=1)
    return logits


@gluon.jit
def _digest(
    logits, step, largest, total, rows, bounds, columns, outputs, cap_log2,
    GROUPS: gl.constexpr, Q_GROUPS: gl.constexpr, STRIDE: gl.constexpr, MASKED: gl.constexpr, TANH: gl.constexpr,
):  # fmt: skip
    """Write the masses of a step's key blocks, and add them to the online log-sum-exp of the rows."""
    diagonal, power, stored, mass_at = rows
    k_len, k_blocks, pitch = bounds
    own, number = columns
    k_powers, masses = outputs
    FOURS: gl.constexpr = largest.type.shape[1]
    PAIR: gl.constexpr = min(GROUPS, 2)
    block = step * (FOURS * 4) + own
    weight = power * gl.load(k_powers + gl.minimum(block, k_blocks - 1))
    logits = logits.reshape([HALF, FOURS, GROUPS // PAIR, 4, PAIR])
    if MASKED or TANH != "none":
        logits *= weight.expand_dims(2).expand_dims(4)
        if TANH != "none":
            logits = tanh(logits, TANH) * cap_log2[0]
        if MASKED:
            tokens = k_len - (block.expand_dims(2).expand_dims(4) * GROUPS + number) * STRIDE
            seen = (block <= diagonal).expand_dims(2).expand_dims(4)
            logits += libdevice.fast_log2f(gl.minimum(gl.maximum(tokens, 1), STRIDE).to(gl.float32) / STRIDE)
            logits = gl.where((tokens > 0) & seen, logits, NOTHING)
        peak = gl.max(gl.max(logits, 4), 2)
        logits -= peak.expand_dims(2).expand_dims(4)
    else:
        peak = gl.max(gl.max(logits, 4), 2) * weight
        logits = logits * weight.expand_dims(2).expand_dims(4) - peak.expand_dims(2).expand_dims(4)
    mass = peak + libdevice.fast_log2f(gl.sum(gl.sum(gl.exp2(logits), 4), 2))
    new = gl.maximum(largest, mass)
    total = total * gl.exp2(largest - new) + gl.exp2(mass - new)
    if MASKED:
        stored = stored & (block < pitch)
    store_in_place(masses + (mass_at + block * Q_GROUPS), mass, stored, True)
    return new, total
