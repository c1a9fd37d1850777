"""The attention kernel for Hopper, in Gluon: one warp loads, two warpgroups compute.

One program computes one 128-token query block of one head. A producer warp walks the row's list and copies key and
value tiles into two rings in shared memory; each of two consumer warpgroups takes 64 of the queries. A consumer
issues the scores of the next tile before the value product of the last one, and the two do not wait for each other,
so that the tensor cores work while one of them exponentiates.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 renamed the one, 3.9 the other.
warpgroup_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LN2 = gl.constexpr(0.6931471805599453)
HALF = gl.constexpr(64)  # queries a warpgroup
BLOCK = gl.constexpr(128)


def tile_layout(shape: list[int]) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of a 16-bit tile [1, 1, tokens, dims]."""
    return gl.NVMMASharedLayout.get_default_for(shape, gl.float16)


@gluon.jit
def hopper_attention_kernel(
    q,  # descriptor of [B, Hq, Tq, D], tiles of 64 tokens
    k,  # descriptor of [B, Hkv, Tk, D], tiles of KEYS tokens
    v,  # descriptor of [B, Hkv, Tk, DV], tiles of KEYS tokens
    out,  # [B, Hq, Tq, DV]
    lse,  # float32 [B, Hq, Tq] contiguous, natural logarithm; unused unless LSE
    indices,  # int32 [B, Hq, R, S], last stride 1
    counts,  # int32 [B, Hq, R]
    out_strides,  # (batch, head, token) in elements, as all strides here
    index_strides,  # (batch, head, row)
    count_strides,  # (batch, head, row)
    rows,
    group,  # query heads a KV head
    q_len,
    k_len,
    scale_log2,  # logit factor times log2(e); positive
    window,  # tokens; read only where WINDOW
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    LSE: gl.constexpr,
):
    # Neighbouring programs share a KV head, so its tiles stay in L2; the last rows, which keep the most, start first.
    row = rows - 1 - gl.program_id(0)
    head = gl.program_id(1)
    batch = gl.program_id(2)
    kv_head = head // group
    indices += batch.to(gl.int64) * index_strides[0] + head.to(gl.int64) * index_strides[1]
    indices += row.to(gl.int64) * index_strides[2]
    count = gl.load(counts + batch * count_strides[0] + head * count_strides[1] + row * count_strides[2])
    offset = k_len - q_len
    # With a prefix the first row may start inside its block: its first tokens then have negative numbers.
    first_token = (offset // BLOCK + row) * BLOCK - offset
    out += batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1]
    lse += (batch.to(gl.int64) * gl.num_programs(1) + head) * q_len

    D_PAD: gl.constexpr = k.block_type.shape[3]
    DV_PAD: gl.constexpr = v.block_type.shape[3]
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D_PAD], q.dtype)
    KEYS: gl.constexpr = k.block_type.shape[2]
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D_PAD], k.dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DV_PAD], v.dtype)
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, HALF, D_PAD], q_layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, D_PAD], k_layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, KEYS, DV_PAD], v_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()

    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (q_full, k_full, k_free, v_full, v_free)
    blocks = (indices, count, first_token)
    geometry = (offset, q_len, scale_log2, window)
    outputs = (out, out_strides[2], lse)
    gl.warp_specialize(
        [
            (_consume, (0, tiles, barriers, blocks, geometry, outputs, DV, STAGES, WINDOW, LSE)),
            (_consume, (1, tiles, barriers, blocks, geometry, outputs, DV, STAGES, WINDOW, LSE)),
            (_produce, ((q, k, v), tiles, barriers, blocks, batch, head, kv_head, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _produce(descriptors, tiles, barriers, blocks, batch, head, kv_head, STAGES: gl.constexpr):
    """Copy Q once, then K one tile ahead of V, in the order in which the consumers need them."""
    q, k, v = descriptors
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_free, v_full, v_free = barriers
    indices, count, first_token = blocks
    mbarrier.expect(q_full.index(0), 2 * q.block_type.nbytes)
    for half in gl.static_range(2):
        load_tile(q, [batch, head, first_token + half * HALF, 0], q_full.index(0), q_tiles.index(half))
    first = _first_key(indices, count, 0, k_tiles.type.shape[1])
    mbarrier.expect(k_full.index(0), k.block_type.nbytes)
    load_tile(k, [batch, kv_head, first, 0], k_full.index(0), k_tiles.index(0))
    steps = count * (BLOCK // k_tiles.type.shape[1])
    for step in range(1, steps + 1):
        last_first = first
        if step < steps:
            first = _first_key(indices, count, step, k_tiles.type.shape[1])
            slot = step % STAGES
            mbarrier.wait(k_free.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
            load_tile(k, [batch, kv_head, first, 0], k_full.index(slot), k_tiles.index(slot))
        slot = (step - 1) % STAGES
        mbarrier.wait(v_free.index(slot), ((step - 1) // STAGES & 1) ^ 1)
        mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
        load_tile(v, [batch, kv_head, last_first, 0], v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def _first_key(indices, count, step, KEYS: gl.constexpr):
    """Return the first key of a step's tile: the row's blocks last to first, a block's tiles first to last."""
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    return gl.load(indices + count - 1 - step // PER_BLOCK) * BLOCK + step % PER_BLOCK * KEYS


@gluon.jit
def _finite(peak, CHECK: gl.constexpr):
    """Replace the maximum of nothing, which is minus infinity, by zero."""
    if CHECK:
        return gl.where(peak == float("-inf"), 0.0, peak)
    else:
        return peak


@gluon.jit
def _consume(
    half,
    tiles,
    barriers,
    blocks,
    geometry,
    outputs,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    LSE: gl.constexpr,
):
    """Attend with 64 queries over the row's blocks, the diagonal one first."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_free, v_full, v_free = barriers
    indices, count, first_token = blocks
    offset, q_len, scale_log2, window = geometry
    out, out_stride, lse = outputs
    KEYS: gl.constexpr = v_tiles.type.shape[1]
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    DV_PAD: gl.constexpr = v_tiles.type.shape[2]
    dtype: gl.constexpr = v_tiles.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PAD, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    row = half * HALF + gl.arange(0, HALF, layout=score_rows)  # in the block
    oldest = row + first_token + offset - window  # the last position that a query's window leaves out
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_layout))
    no_score = gl.zeros([HALF, KEYS], gl.float32, score_layout)
    query = q_tiles.index(half)

    # The diagonal block's first tile. Every query sees a key in it, unless a window leaves out the part of the block
    # that this tile is: only then can a maximum be infinite.
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    score = warpgroup_mma(query, k_tiles.index(0).permute((1, 0)), no_score, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=(score,))
    warpgroup_barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    score = gl.where(column[None, :] <= row[:, None], score, float("-inf"))
    if WINDOW:
        key = _first_key(indices, count, 0, KEYS) + column
        score = gl.where(key[None, :] > oldest[:, None], score, float("-inf"))
    peak = gl.max(score, 1) * scale_log2
    weight = gl.exp2(score * scale_log2 - _finite(peak, WINDOW and PER_BLOCK > 1)[:, None])
    total = gl.sum(weight, 1)
    operand = gl.convert_layout(weight.to(dtype), weight_layout)
    acc = gl.zeros([HALF, DV_PAD], gl.float32, out_layout)

    steps = count * PER_BLOCK
    for step in range(1, steps):
        slot = step % STAGES
        last = (step - 1) % STAGES
        mbarrier.wait(k_full.index(slot), step // STAGES & 1)
        score = warpgroup_mma(query, k_tiles.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(last), (step - 1) // STAGES & 1)
        acc = warpgroup_mma(operand, v_tiles.index(last), acc, is_async=True)
        score = warpgroup_mma_wait(1, deps=(score,))
        warpgroup_barrier()
        mbarrier.arrive(k_free.index(slot), count=1)
        if PER_BLOCK > 1:  # the rest of the diagonal block
            ahead = gl.where(step < PER_BLOCK, step * KEYS, -BLOCK)
            score = gl.where(column[None, :] + ahead <= row[:, None], score, float("-inf"))
        if WINDOW:
            key = _first_key(indices, count, step, KEYS) + column
            score = gl.where(key[None, :] > oldest[:, None], score, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(score, 1) * scale_log2)
        base = _finite(new_peak, WINDOW and PER_BLOCK > 1)
        weight = gl.exp2(score * scale_log2 - base[:, None])
        decay = gl.exp2(peak - base)
        total = total * decay + gl.sum(weight, 1)
        peak = new_peak
        acc, operand = warpgroup_mma_wait(0, deps=(acc, operand))
        warpgroup_barrier()
        mbarrier.arrive(v_free.index(last), count=1)
        acc = acc * gl.convert_layout(decay, out_rows)[:, None]
        operand = gl.convert_layout(weight.to(dtype), weight_layout)

    last = (steps - 1) % STAGES
    mbarrier.wait(v_full.index(last), (steps - 1) // STAGES & 1)
    acc = warpgroup_mma(operand, v_tiles.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    acc = acc / gl.convert_layout(total, out_rows)[:, None]
    out_token = first_token + half * HALF + gl.arange(0, HALF, layout=out_rows)
    dims = gl.arange(0, DV_PAD, layout=gl.SliceLayout(0, out_layout))
    present = (out_token >= 0) & (out_token < q_len)
    out_at = out + out_token.to(gl.int64)[:, None] * out_stride + dims[None, :]
    gl.store(out_at, acc.to(dtype), mask=present[:, None] & (dims < DV)[None, :])
    if LSE:
        token = row + first_token
        gl.store(lse + token, (peak + gl.log2(total)) * LN2, mask=(token >= 0) & (token < q_len))
