"""The attention kernel for Hopper, in Gluon: one warp loads, one or two warpgroups compute.

One program computes one query block of one head. A producer warp walks the row's list and copies key and value tiles
into two rings in shared memory; each consumer warpgroup takes 64 of the queries. Two of them share a block of 128; a
block of 64 has one, and two programs share a multiprocessor. A consumer issues the scores of the next tile before the
value product of the last one, which runs while it exponentiates.

With `residual="mean"` tiles of mean keys and mean values follow a row's kept tiles: a key of such a tile stands for a
block, so its logit grows by the logarithm of a block's tokens, and counts only where the row prunes the block.
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

from stem_attn.backends.triton.launch_order import UNSPECIALISED, row_and_head
from stem_attn.backends.triton.rescale_kernel import rescale
from stem_attn.backends.triton.tanh_kernel import tanh

# Triton renamed the first in 3.7 and the others in 3.9.
warpgroup_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
SLACK = gl.constexpr(8.0)
"""How far, as a power of two, scores may rise above the maximum that weights are relative to before it moves.

Weights are then at most 256, sums in float32 lose nothing, and the accumulators of most tiles need no new scale.
"""
LN2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
HALF = gl.constexpr(64)  # queries a warpgroup
CHUNK = gl.constexpr(64)  # numbers of 16 bits in a row of shared memory, 128 bytes


def box_shape(keys: int, head_dim: int, page: int) -> tuple[int, int]:
    """Return what one copy brings of a tile of keys or values: tokens and dims.

    Args:
        keys: Tokens a tile.
        head_dim: Padded to a power of two.
        page: Tokens a page, or 0. Several pages make a tile where they are smaller.
    """
    return (page, CHUNK.value) if 0 < page < keys else (keys, head_dim)


def box_layout(shape: tuple[int, int]) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of a 16-bit box [1, 1, tokens, dims]."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, *shape], gl.float16)


@gluon.jit(
    do_not_specialize=UNSPECIALISED,
    do_not_specialize_on_alignment=["block_table", "sinks"],
)
def hopper_attention_kernel(
    q,  # descriptor of [B, Hq, Tq, D], tiles of 64 tokens
    k,  # descriptor of [B, Hkv, Tk, D], or of [pages, Hkv, PAGE, D] where paged; boxes of `box_shape`
    v,  # descriptor of [B, Hkv, Tk, DV], likewise
    out,  # [B, Hq, Tq, DV]
    lse,  # float32 [B, Hq, Tq] contiguous, natural logarithm; unused unless LSE
    indices,  # int32 [B, Hq, R, S], last stride 1
    counts,  # int32 [B, Hq, R]
    block_table,  # int32 [pages of the sequence]; unused unless paged, and then B = 1
    sinks,  # [Hq], floating: a logit in the softmax's sum; unused unless SINKS
    k_means,  # descriptor of [B, Hkv, columns, D_PAD], boxes of KEYS; None, as the next two: pruned blocks are lost
    v_means,  # descriptor of [B, Hkv, columns, DV_PAD], likewise
    kept,  # int32 [B, Hq, R, words], a bit a key block, see `mark_kernel`
    out_strides,  # (batch, head, token) in elements, as all strides here
    index_batch,  # strides of indices and counts, numbers of their own: a tuple's cannot be left unspecialised
    index_head,
    index_row,
    count_batch,
    count_head,
    count_row,
    rows,
    lead,  # rows that start first
    group,  # query heads a KV head
    q_len,
    k_len,
    scale_log2,  # logit factor times log2(e), positive; of the tanh where there is one, and then the softcap's
    tanh_factor,  # logit factor over the softcap; read only where there is one
    window,  # tokens; read only where WINDOW
    DV: gl.constexpr,
    DV_PAD: gl.constexpr,  # a power of two
    KEYS: gl.constexpr,  # keys a tile; divides BLOCK
    PAGE: gl.constexpr,  # tokens a page; divides KEYS or is a multiple of it; 0: k and v are not paged
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    LSE: gl.constexpr,
    SINKS: gl.constexpr,
    TANH: gl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
    BLOCK: gl.constexpr,  # tokens a block: 64 or 128
    MAY_SKIP: gl.constexpr,  # whether a row may keep nothing: what it would write is then left alone
):
    CONSUMERS: gl.constexpr = BLOCK // HALF
    heads = gl.num_programs(0) // rows
    row, head = row_and_head(rows, lead)
    batch = gl.program_id(1)
    kv_head = head // group
    indices += batch.to(gl.int64) * index_batch + head.to(gl.int64) * index_head
    indices += row.to(gl.int64) * index_row
    count = gl.load(counts + batch * count_batch + head * count_head + row * count_row)
    if MAY_SKIP:  # noqa: SIM102 - known when it is compiled
        if count == 0:
            return
    offset = k_len - q_len
    # With a prefix the first row may start inside its block: its first tokens then have negative numbers.
    first_token = (offset // BLOCK + row) * BLOCK - offset
    out += batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1]
    lse += (batch.to(gl.int64) * heads + head) * q_len
    gl.static_assert(kept is None or KEYS == BLOCK)
    # A row of `kept` has whole runs of 128 blocks.
    row_words = ((batch.to(gl.int64) * heads + head) * rows + row) * (gl.cdiv(k_len, BLOCK * 128) * 4)
    pruning = (kept + row_words,) if kept is not None else ()
    means = (k_means, v_means, offset) if kept is not None else ()

    D_PAD: gl.constexpr = q.block_type.shape[3]
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D_PAD], q.dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D_PAD], k.dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DV_PAD], v.dtype)
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, HALF, D_PAD], q_layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, D_PAD], k_layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, KEYS, DV_PAD], v_layout)
    barriers = make_barriers(STAGES, CONSUMERS)

    tiles = (q_tiles, k_tiles, v_tiles)
    blocks = (indices, count, first_token)
    # Without what is not read: it would be carried over to the warpgroups all the same.
    geometry = (offset, q_len, scale_log2, window, (tanh_factor,) if TANH != "none" else ())
    outputs = (out, out_strides[2], lse, (sinks + head,) if SINKS else ())
    values = (tiles, barriers, blocks, geometry, outputs, pruning)
    source = (batch, block_table, k_len)
    producer_registers: gl.constexpr = 40 if PAGE > 0 and PAGE < KEYS else 24  # it holds the numbers of a tile's pages
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, values, DV, STAGES, PAGE > 0, WINDOW, LSE, SINKS, TANH, BLOCK)),
                (_consume, (1, values, DV, STAGES, PAGE > 0, WINDOW, LSE, SINKS, TANH, BLOCK)),
                (_produce, ((q, k, v), means, tiles, barriers, blocks, source, head, kv_head, STAGES, PAGE, BLOCK)),
            ],
            [4, 1],
            [232 if producer_registers > 24 else 240, producer_registers],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, values, DV, STAGES, PAGE > 0, WINDOW, LSE, SINKS, TANH, BLOCK)),
                (_produce, ((q, k, v), means, tiles, barriers, blocks, source, head, kv_head, STAGES, PAGE, BLOCK)),
            ],
            [1],
            [producer_registers],
        )


@gluon.jit
def make_barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Return the barriers of a program's tiles, ready for use: of Q, and of each ring's filled and free slots."""
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    fence_async_shared()
    return q_full, k_full, k_free, v_full, v_free


@gluon.jit
def _produce(
    descriptors,
    means,
    tiles,
    barriers,
    blocks,
    source,
    head,
    kv_head,
    STAGES: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """Copy Q once, then K one tile ahead of V, in the order in which the consumers need them."""
    q, k, v = descriptors
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_free, v_full, v_free = barriers
    indices, count, first_token = blocks
    KEYS: gl.constexpr = k_tiles.type.shape[1]
    mbarrier.expect(q_full.index(0), BLOCK // HALF * q.block_type.nbytes)
    for half in gl.static_range(BLOCK // HALF):
        load_box(q, [source[0], head, first_token + half * HALF, 0], q_full.index(0), q_tiles.index(half))
    first = _first_key(indices, count, 0, KEYS, BLOCK)
    _copy(k, k_tiles, k_full, 0, kv_head, first, _outer(source, first, KEYS, PAGE), PAGE)
    steps = count * (BLOCK // KEYS)
    for step in range(1, steps + 1):
        last_first = first
        if step < steps:
            first = _first_key(indices, count, step, KEYS, BLOCK)
            outer = _outer(source, first, KEYS, PAGE)
            slot = step % STAGES
            mbarrier.wait(k_free.index(slot), (step // STAGES & 1) ^ 1)
            _copy(k, k_tiles, k_full, slot, kv_head, first, outer, PAGE)
        outer = _outer(source, last_first, KEYS, PAGE)
        slot = (step - 1) % STAGES
        mbarrier.wait(v_free.index(slot), ((step - 1) // STAGES & 1) ^ 1)
        _copy(v, v_tiles, v_full, slot, kv_head, last_first, outer, PAGE)
    if len(means) > 0:
        for tile in range(_mean_tiles(count, (means[2] + first_token) // BLOCK, KEYS)):
            step = steps + tile
            slot = step % STAGES
            mbarrier.wait(k_free.index(slot), (step // STAGES & 1) ^ 1)
            _copy(means[0], k_tiles, k_full, slot, kv_head, tile * KEYS, (source[0],), 0)
            mbarrier.wait(v_free.index(slot), (step // STAGES & 1) ^ 1)
            _copy(means[1], v_tiles, v_full, slot, kv_head, tile * KEYS, (source[0],), 0)


@gluon.jit
def _outer(source, first, KEYS: gl.constexpr, PAGE: gl.constexpr):
    """Return the outermost coordinate of each copy of a tile: the batch row, or the pages that hold the tile."""
    batch, block_table, k_len = source
    if PAGE == 0:
        return (batch,)
    else:
        pages = ()
        for token in gl.static_range(0, KEYS, PAGE):
            # No page has number -1: the copy engine writes zeros for it.
            at = block_table + (first + token) // PAGE
            pages += (gl.load(at, mask=first + token < k_len, other=-1),)  # type: ignore[assignment]
        return pages


@gluon.jit
def _copy(descriptor, tiles, full, slot, kv_head, first, outer, PAGE: gl.constexpr):
    """Copy the tile of keys or values from token `first` on into a slot, in one box or in one a page and 64 dims."""
    COPIES: gl.constexpr = len(outer)
    CHUNKS: gl.constexpr = tiles.type.shape[2] // descriptor.block_type.shape[3]
    mbarrier.expect(full.index(slot), COPIES * CHUNKS * descriptor.block_type.nbytes)
    if COPIES == 1:
        inner = first % PAGE if PAGE > 0 else first
        load_box(descriptor, [outer[0], kv_head, inner, 0], full.index(slot), tiles.index(slot))
    else:
        # Shared memory holds a tile as columns of 64 numbers, so a page's rows of one column lie together.
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, CHUNK], tiles.dtype)
        if REINTERPRET:
            boxes = tiles.index(slot).reinterpret(tiles.dtype, [CHUNKS * COPIES, PAGE, CHUNK], layout)
        else:
            boxes = tiles.index(slot)._reinterpret(tiles.dtype, [CHUNKS * COPIES, PAGE, CHUNK], layout)
        for chunk in gl.static_range(CHUNKS):
            for i in gl.static_range(COPIES):
                at = [outer[i], kv_head, 0, chunk * CHUNK]
                load_box(descriptor, at, full.index(slot), boxes.index(chunk * COPIES + i))


@gluon.jit
def _first_key(indices, count, step, KEYS: gl.constexpr, BLOCK: gl.constexpr):
    """Return the first key of a step's tile: the row's blocks last to first, a block's tiles first to last."""
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    return gl.load(indices + count - 1 - step // PER_BLOCK) * BLOCK + step % PER_BLOCK * KEYS


@gluon.jit
def _clear_tail(tile, held):
    """Zero the rows of a tile from `held` on."""
    ROWS: gl.constexpr = 16
    KEYS: gl.constexpr = tile.type.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for start in gl.static_range(0, KEYS, ROWS):
        part = tile.slice(start, ROWS)
        row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        part.store(gl.where(row[:, None] < held, part.load(layout), 0.0))


@gluon.jit
def _finite(peak, CHECK: gl.constexpr):
    """Replace the maximum of nothing, which is minus infinity, by zero."""
    if CHECK:
        return gl.where(peak == float("-inf"), 0.0, peak)
    else:
        return peak


@gluon.jit
def _mean_tiles(count, past, KEYS: gl.constexpr):
    """Return a row's tiles of means: none where it keeps all past blocks."""
    return gl.where(count > past, 0, gl.cdiv(past, KEYS))


@gluon.jit
def _pruned_words(kept, past, first, KEYS: gl.constexpr):
    """Return words with a bit for each of KEYS blocks from `first` on, set where it is past and pruned.

    Nothing is read where `first` is negative.
    """
    words = ()
    for start in gl.static_range(0, KEYS, 32):
        whole = gl.minimum(gl.maximum(past - first - start, 0), 32)
        ones = (1 << whole.to(gl.int64)) - 1
        word = gl.load(kept + (first + start) // 32, mask=first >= 0, other=0)
        words += (~word & ones.to(gl.int32),)  # type: ignore[assignment]
    return words


@gluon.jit
def _bits(words, column):
    """Return the columns' bits of some words."""
    word = column * 0
    for i in gl.static_range(len(words)):
        word = gl.where(column // 32 == i, words[i], word)
    return (word >> (column % 32)) & 1


@gluon.jit
def _consume(
    half,
    values,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    PAGED: gl.constexpr,
    WINDOW: gl.constexpr,
    LSE: gl.constexpr,
    SINKS: gl.constexpr,
    TANH: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """Attend with 64 queries over the row's blocks, the diagonal one first."""
    tiles, barriers, blocks, geometry, outputs, pruning = values
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_free, v_full, v_free = barriers
    indices, count, first_token = blocks
    offset, q_len, scale_log2, window, tanh_factor = geometry
    out, out_stride, lse, sink_at = outputs
    KEYS: gl.constexpr = v_tiles.type.shape[1]
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    LOG2_BLOCK: gl.constexpr = 7.0 if BLOCK == 128 else 6.0
    RESIDUAL: gl.constexpr = len(pruning) > 0
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
    if query.type.shape[1] <= 128 and DV_PAD <= 128:  # else there are too few registers
        query = query.load(gl.DotOperandLayout(0, score_layout, 2))
    mbarrier.wait(k_full.index(0), 0)
    score = warpgroup_mma(query, k_tiles.index(0).permute((1, 0)), no_score, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=(score,))
    warpgroup_barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    if TANH != "none":
        score = tanh(score * tanh_factor[0], TANH)
    score = gl.where(column[None, :] <= row[:, None], score, float("-inf"))
    if WINDOW:
        key = _first_key(indices, count, 0, KEYS, BLOCK) + column
        score = gl.where(key[None, :] > oldest[:, None], score, float("-inf"))
    peak = gl.max(score, 1) * scale_log2
    weight = gl.exp2(score * scale_log2 - _finite(peak, WINDOW and PER_BLOCK > 1)[:, None])
    total = gl.sum(weight, 1)
    operand = gl.convert_layout(weight.to(dtype), weight_layout)
    acc = gl.zeros([HALF, DV_PAD], gl.float32, out_layout)

    if PAGED:
        # The last page may hold anything past the end, even NaN, which a weight of zero does not hide. All
        # warpgroups write the same zeros.
        held = q_len - first_token
        if held < BLOCK:
            for i in gl.static_range(PER_BLOCK):
                mbarrier.wait(v_full.index(i), 0)
                _clear_tail(v_tiles.index(i), held - i * KEYS)
            fence_async_shared()
            warpgroup_barrier()

    decay = gl.full([HALF], 1.0, gl.float32, score_rows)
    steps = count * PER_BLOCK
    end = steps
    if RESIDUAL:
        past = (offset + first_token) // BLOCK
        end += _mean_tiles(count, past, KEYS)
    mbarrier.wait(k_full.index(1), 0, pred=end > 1)
    for step in range(1, end):
        slot = step % STAGES
        last = (step - 1) % STAGES
        if RESIDUAL:
            words = _pruned_words(pruning[0], past, (step - steps) * KEYS, KEYS)
        score = warpgroup_mma(query, k_tiles.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
        acc = rescale(acc, gl.convert_layout(decay, out_rows))
        mbarrier.wait(v_full.index(last), (step - 1) // STAGES & 1)
        acc = warpgroup_mma(operand, v_tiles.index(last), acc, is_async=True)
        score = warpgroup_mma_wait(1, deps=(score,))
        warpgroup_barrier()
        mbarrier.arrive(k_free.index(slot), count=1)
        if TANH != "none":
            score = tanh(score * tanh_factor[0], TANH)
        if PER_BLOCK > 1:  # the rest of the diagonal block
            start = gl.where(step < PER_BLOCK, step * KEYS, -BLOCK)
            score = gl.where(column[None, :] + start <= row[:, None], score, float("-inf"))
        if WINDOW:
            key = _first_key(indices, count, step, KEYS, BLOCK) + column
            score = gl.where(key[None, :] > oldest[:, None], score, float("-inf"))
        if RESIDUAL:  # noqa: SIM102 - known when it is compiled
            if step >= steps:
                score = gl.where((_bits(words, column) != 0)[None, :], score, float("-inf"))
        tile_peak = gl.max(score, 1) * scale_log2
        if RESIDUAL:
            tile_peak += gl.where(step < steps, 0.0, LOG2_BLOCK)
        new_peak = gl.where(tile_peak > peak + SLACK, tile_peak, peak)
        base = _finite(new_peak, WINDOW and PER_BLOCK > 1)
        if RESIDUAL:
            weight = gl.exp2(score * scale_log2 - (base - gl.where(step < steps, 0.0, LOG2_BLOCK))[:, None])
        else:
            weight = gl.exp2(score * scale_log2 - base[:, None])
        decay = gl.exp2(peak - base)
        total = total * decay + gl.sum(weight, 1)
        peak = new_peak
        # The assembler moves the wait for the value product up, before the exponentials, if nothing that branches
        # stands between. So the wait for the next keys is here.
        ahead = step + 1
        mbarrier.wait(k_full.index(ahead % STAGES), ahead // STAGES & 1, pred=ahead < end)
        acc, operand = warpgroup_mma_wait(0, deps=(acc, operand))
        warpgroup_barrier()
        mbarrier.arrive(v_free.index(last), count=1)
        operand = gl.convert_layout(weight.to(dtype), weight_layout)

    last = (end - 1) % STAGES
    acc = rescale(acc, gl.convert_layout(decay, out_rows))
    mbarrier.wait(v_full.index(last), (end - 1) // STAGES & 1)
    acc = warpgroup_mma(operand, v_tiles.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    if SINKS:  # only now: weights that were small beside a sink's would lose digits in 16 bits
        sink = gl.load(sink_at[0]).to(gl.float32) * LOG2_E
        whole_peak = gl.maximum(peak, sink)
        decay = gl.exp2(peak - whole_peak)
        total = total * decay + gl.exp2(sink - whole_peak)
        acc = acc * gl.convert_layout(decay, out_rows)[:, None]
        peak = whole_peak
    acc = acc / gl.convert_layout(total, out_rows)[:, None]
    out_token = first_token + half * HALF + gl.arange(0, HALF, layout=out_rows)
    dims = gl.arange(0, DV_PAD, layout=gl.SliceLayout(0, out_layout))
    present = (out_token >= 0) & (out_token < q_len)
    out_at = out + out_token.to(gl.int64)[:, None] * out_stride + dims[None, :]
    gl.store(out_at, acc.to(dtype), mask=present[:, None] & (dims < DV)[None, :])
    if LSE:
        token = row + first_token
        gl.store(lse + token, (peak + gl.log2(total)) * LN2, mask=(token >= 0) & (token < q_len))
