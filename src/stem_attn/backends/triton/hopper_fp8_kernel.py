"""The attention kernel for Hopper with 8-bit products (e4m3), in Gluon; made like that of `hopper_kernel`.

It reads what `quantize_kernels` wrote: whole blocks, so it knows neither pages nor strides. A block of values lies
transposed, as the 8-bit instruction wants it, and its keys in the order in which `_pack` puts the weights: what a
thread holds of a score tile is then what it must hold of the next product's left operand, and nothing moves.

The tensor core adds 8-bit products in about 22 bits (14 of the sum's). So every tile's product with the values is a
sum of its own, added in float32. Its weights are relative to the tile's own maximum, so that tiles of small weights
lose no digits.

No exponential is computed. The bits of an e4m3 number, read as an integer, are 8 times its logarithm to base 2, with a
straight line from each power of two to the next. So a logit, scaled and rounded to an integer, is its weight's bits: up
to 6% too large, on average 4%, of which the same is in the sum that they are divided by.

A tile has as many keys as a program has queries: 128, with two consumers, or 64, with one. A block of 128 may be two
programs of 64. Each starts at its own keys, the only ones that need a causal mask, and goes back to the first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from stem_attn.backends.triton.hopper_kernel import HALF, LN2, LOG2_E, load_box, make_barriers, warpgroup_barrier
from stem_attn.backends.triton.launch_order import UNSPECIALISED, row_and_head
from stem_attn.backends.triton.rescale_kernel import rescale
from stem_attn.backends.triton.tanh_kernel import tanh

TOP = gl.constexpr(126.0)
"""The bits of a tile's largest weight, 448. 127 is NaN."""
TOP_LOG2 = gl.constexpr(8.8073549)
"""Its logarithm. Weights are above the line 2^(bits / 8 - 7) by 4%, and this one is too."""
STEP = gl.constexpr(2.0**-24)
"""The smallest float16."""
REACH = gl.constexpr(48.0)
"""How far, as a power of two, a tile's maximum may rise above what sums are relative to before they get a new scale."""


def box_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of a box [1, 1, rows, columns] of 8-bit numbers."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.float8e4nv)


@gluon.jit(
    do_not_specialize=UNSPECIALISED,
    do_not_specialize_on_alignment=["sinks"],
)
def hopper_fp8_kernel(
    q,  # descriptor of e4m3 [B, Hq, R * BLOCK, D], boxes of 64 tokens
    k,  # descriptor of e4m3 [B, Hkv, Kb * BLOCK, D], boxes of a tile: a block, or half of one
    v,  # descriptor of e4m3 [B, Hkv, Kb * DV, BLOCK], boxes of a tile
    q_scales,  # float32 [B, Hq, R * BLOCK], what a query's numbers are multiplied with
    kv_scales,  # float32 [2, B, Hkv], k's and v's
    unsafe,  # int32 [B, Hkv], whether a head is left to another kernel
    shifts,  # float32 [B, Hq, R * BLOCK], what a query's dot products lack; unused unless SHIFTED
    out,  # [B, Hq, Tq, DV]
    lse,  # float32 [B, Hq, Tq] contiguous, natural logarithm; unused unless LSE
    indices,  # int32 [B, Hq, R, S], last stride 1
    counts,  # int32 [B, Hq, R]
    sinks,  # [Hq], floating: a logit in the softmax's sum; unused unless SINKS
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
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    LSE: gl.constexpr,
    SINKS: gl.constexpr,
    TANH: gl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
    BLOCK: gl.constexpr,  # tokens a block: 64 or 128
):
    KEYS: gl.constexpr = k.block_type.shape[2]
    CONSUMERS: gl.constexpr = KEYS // HALF
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    heads = gl.num_programs(0) // (rows * PER_BLOCK)
    row, head = row_and_head(rows, lead, PER_BLOCK)
    place = gl.program_id(0) % PER_BLOCK  # of the program's queries in their block
    batch = gl.program_id(1)
    kv_heads = heads // group
    kv_head = head // group
    indices += batch.to(gl.int64) * index_batch + head.to(gl.int64) * index_head
    indices += row.to(gl.int64) * index_row
    if gl.load(unsafe + batch * kv_heads + kv_head) != 0:
        return
    count = gl.load(counts + batch * count_batch + head * count_head + row * count_row)
    offset = k_len - q_len
    # With a prefix the first row may start inside its block: its first tokens then have negative numbers.
    first_token = (offset // BLOCK + row) * BLOCK - offset + place * KEYS
    out += batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1]
    lse += (batch.to(gl.int64) * heads + head) * q_len
    first_row = ((batch.to(gl.int64) * heads + head) * rows + row) * BLOCK + place * KEYS
    shifts += first_row
    q_scales += first_row
    k_scale = gl.load(kv_scales + batch * kv_heads + kv_head)
    v_scale = gl.load(kv_scales + (gl.num_programs(1) + batch) * kv_heads + kv_head)

    D: gl.constexpr = q.block_type.shape[3]
    DV_PAD: gl.constexpr = v.block_type.shape[2]
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], q.dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], k.dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DV_PAD, KEYS], v.dtype)
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, HALF, D], q_layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, D], k_layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, DV_PAD, KEYS], v_layout)
    barriers = make_barriers(STAGES, CONSUMERS)

    tiles = (q_tiles, k_tiles, v_tiles)
    blocks = (indices, count, place, first_token)
    factors = (q_scales, k_scale, v_scale, scale_log2, (tanh_factor,) if TANH != "none" else ())
    # Without what is not read: it would be carried over to the warpgroups all the same.
    shift_at = (shifts,) if SINKS or LSE or TANH != "none" else ()
    geometry = (q_len, (first_token + offset - window,) if WINDOW else (), shift_at)
    outputs = (out, out_strides[2], lse, (sinks + head,) if SINKS else ())
    values = (tiles, barriers, blocks, geometry, factors, outputs)
    source = (batch, row * BLOCK + place * KEYS, head, kv_head)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, values, DV, STAGES, WINDOW, LSE, SINKS, TANH, BLOCK)),
                (_consume, (1, values, DV, STAGES, WINDOW, LSE, SINKS, TANH, BLOCK)),
                (_produce, ((q, k, v), tiles, barriers, blocks, source, STAGES, BLOCK)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, values, DV, STAGES, WINDOW, LSE, SINKS, TANH, BLOCK)),
                (_produce, ((q, k, v), tiles, barriers, blocks, source, STAGES, BLOCK)),
            ],
            [1],
            [24],
        )


@gluon.jit
def _produce(descriptors, tiles, barriers, blocks, source, STAGES: gl.constexpr, BLOCK: gl.constexpr):
    """Copy Q once, then K one tile ahead of V, in the order in which the consumers need them: last to first."""
    q, k, v = descriptors
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_free, v_full, v_free = barriers
    batch, first_query, head, kv_head = source
    DV_PAD: gl.constexpr = v.block_type.shape[2]
    KEYS: gl.constexpr = k.block_type.shape[2]
    mbarrier.expect(q_full.index(0), KEYS // HALF * q.block_type.nbytes)
    for half in gl.static_range(KEYS // HALF):
        load_box(q, [batch, head, first_query + half * HALF, 0], q_full.index(0), q_tiles.index(half))
    first = _first_key(blocks, 0, KEYS, BLOCK)
    mbarrier.expect(k_full.index(0), k.block_type.nbytes)
    load_box(k, [batch, kv_head, first, 0], k_full.index(0), k_tiles.index(0))
    steps = _steps(blocks, KEYS, BLOCK)
    for step in range(1, steps + 1):
        last_first = first
        if step < steps:
            first = _first_key(blocks, step, KEYS, BLOCK)
            slot = step % STAGES
            mbarrier.wait(k_free.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
            load_box(k, [batch, kv_head, first, 0], k_full.index(slot), k_tiles.index(slot))
        slot = (step - 1) % STAGES
        mbarrier.wait(v_free.index(slot), ((step - 1) // STAGES & 1) ^ 1)
        mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
        at = [batch, kv_head, last_first // BLOCK * DV_PAD, last_first % BLOCK]
        load_box(v, at, v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def _steps(blocks, KEYS: gl.constexpr, BLOCK: gl.constexpr):
    """Return the tiles of a program: those of all kept blocks, but for what comes after its queries."""
    _, count, place, _ = blocks
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    return count * PER_BLOCK - (PER_BLOCK - 1 - place)


@gluon.jit
def _first_key(blocks, step, KEYS: gl.constexpr, BLOCK: gl.constexpr):
    """Return the first key of a step's tile: that of the program's own tokens first, then last to first."""
    indices, count, place, _ = blocks
    PER_BLOCK: gl.constexpr = BLOCK // KEYS
    turn = step + (PER_BLOCK - 1 - place)
    block = gl.load(indices + count - 1 - turn // PER_BLOCK)
    return block * BLOCK + (PER_BLOCK - 1 - turn % PER_BLOCK) * KEYS


@gluon.jit
def _weigh(score, factor, peak):
    """Return weights 2^(score * factor - peak), the largest 448, as bits of e4m3, in 16 bits each.

    Below 2^-14 the bits of a float16, read as an integer, count steps of 2^-24.

    Args:
        score: float32 [64, KEYS], dot products.
        factor: float32 [64], what makes logits of them, in powers of two.
        peak: float32 [64], the rows' largest logits.

    Returns:
        int32 [64, KEYS / 2], two weights each.
    """
    KEYS: gl.constexpr = score.shape[1]
    top = TOP - peak * 8.0
    top -= gl.abs(top) * 2.0**-22  # large logits lose digits: none may round to 127
    steps = score * (factor * (8.0 * STEP))[:, None] + (top * STEP)[:, None]
    even, odd = steps.reshape([HALF, KEYS // 2, 2]).split()
    return gl.inline_asm_elementwise(
        "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _pack(weight):
    """Join what `_weigh` returns to int32 [64, KEYS / 4] of four weights each, moving nothing.

    A thread holds columns 8 h + 2 t + e of a row's 16, h and e each 0 or 1 and t its number among four. As a left
    operand it must hold columns 4 t + 2 h + e. So that is where column 8 h + 2 t + e goes, as does the value it meets.
    """
    WORDS: gl.constexpr = weight.shape[1] // 2
    pairs = weight.reshape([HALF, WORDS // 4, 2, 4]).permute((0, 1, 3, 2)).reshape([HALF, WORDS, 2])
    first, second = pairs.split()
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _multiply(packed, values, nothing):
    """Issue the product of weights from `_pack` with values; return their sum, nothing added to it yet."""
    twice = gl.join(packed, packed)
    fours = gl.join(twice, twice).reshape([HALF, packed.shape[1] * 4])
    fours = gl.convert_layout(fours, gl.DotOperandLayout(0, nothing.type.layout, 4), assert_trivial=True)
    operand = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [fours], dtype=gl.float8e4nv, is_pure=True, pack=4
    )
    return warpgroup_mma(operand, values.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _add_halves(a, b):
    return gl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _sum(weight, layout: gl.constexpr):
    """Sum the rows of what `_weigh` returns; float32 [64].

    Times 128 the bits of an e4m3 number are those of a float16, 2^-8 of it. A tile's are added in float16.
    """
    halves = gl.inline_asm_elementwise("shl.b32 $0, $1, 7;", "=r,r", [weight], dtype=gl.int32, is_pure=True, pack=1)
    total = gl.inline_asm_elementwise(
        "{\n.reg .b16 low, high;\n.reg .f32 x, y;\nmov.b32 {low, high}, $1;\n"
        "cvt.f32.f16 x, low;\ncvt.f32.f16 y, high;\nadd.f32 x, x, y;\nmul.f32 $0, x, 0f43800000;\n}",
        "=f,r",
        [gl.reduce(halves, 1, _add_halves)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return gl.convert_layout(total, layout)


@gluon.jit
def _see(score, row, column, oldest, blocks, step, WINDOW: gl.constexpr, BLOCK: gl.constexpr):
    """Leave out the keys of a step's tile that a query's window does not reach; `oldest` is the first query's."""
    if WINDOW:
        before = oldest[0] - _first_key(blocks, step, score.shape[1], BLOCK)
        score = gl.where(column[None, :] > (row + before)[:, None], score, float("-inf"))
    return score


@gluon.jit
def _cap(score, cap, TANH: gl.constexpr):
    """Put a softcap on dot products, less what they lack."""
    if TANH != "none":
        return tanh(score * cap[0][:, None] + cap[1][:, None], TANH)
    else:
        return score


@gluon.jit
def _add(acc, piece: gl.constexpr, part, decay, share):
    """Scale a piece of the sums, and add a tile's part times its share."""
    rows: gl.constexpr = gl.SliceLayout(1, part.type.layout)
    sums = ()
    for i in gl.static_range(len(acc)):
        if i == piece:
            scaled = rescale(acc[i], gl.convert_layout(decay, rows))
            sums += (scaled + part * gl.convert_layout(share, rows)[:, None],)  # type: ignore[assignment]
        else:
            sums += (acc[i],)  # type: ignore[assignment]
    return sums


@gluon.jit
def _add_in_turns(acc, packed, values, nothing, decay, share):
    """Add the product of weights from `_pack` with values, a piece after the other."""
    PIECE: gl.constexpr = nothing.shape[1]
    for piece in gl.static_range(len(acc)):
        part = _multiply(packed, values.slice(piece * PIECE, PIECE), nothing)
        part, packed = warpgroup_mma_wait(0, deps=(part, packed))
        acc = _add(acc, piece, part, decay, share)
    return acc


@gluon.jit
def _consume(
    half,
    values,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    LSE: gl.constexpr,
    SINKS: gl.constexpr,
    TANH: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """Attend with 64 queries over the row's blocks, the diagonal one first."""
    tiles, barriers, blocks, geometry, factors, outputs = values
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_free, v_full, v_free = barriers
    _, count, _, first_token = blocks
    q_len, oldest, shift_at = geometry
    q_scales, k_scale, v_scale, scale_log2, tanh_factor = factors
    out, out_stride, lse, sink_at = outputs
    KEYS: gl.constexpr = v_tiles.type.shape[2]
    DV_PAD: gl.constexpr = v_tiles.type.shape[1]
    # A thread's registers hold no second sum of more value dims: a tile is then added piece by piece.
    PIECES: gl.constexpr = 1 if DV_PAD <= 128 else DV_PAD // 128
    PIECE: gl.constexpr = DV_PAD // PIECES
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    # Its place in the tile. The assembler must not know which keys the first warpgroup never sees: weights that it knew
    # to be zeros it joined wrongly.
    row = (half + (count >> 30)) * HALF + gl.arange(0, HALF, layout=score_rows)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_layout))
    no_score = gl.zeros([HALF, KEYS], gl.float32, score_layout)
    no_value = gl.zeros([HALF, PIECE], gl.float32, out_layout)
    query = q_tiles.index(half)
    dot_scale = gl.load(q_scales + row) * k_scale
    if TANH == "none":
        factor = dot_scale * scale_log2
        cap = ()
    else:
        factor = scale_log2 + gl.zeros_like(dot_scale)
        cap = (  # type: ignore[assignment]
            dot_scale * tanh_factor[0],
            gl.load(shift_at[0] + row) * tanh_factor[0],
        )

    # The program's own keys. Every query sees one of them, so that no maximum is infinite.
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    score = warpgroup_mma(query, k_tiles.index(0).permute((1, 0)), no_score, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=(score,))
    warpgroup_barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    score = _cap(score, cap, TANH)
    score = gl.where(column[None, :] <= row[:, None], score, float("-inf"))
    score = _see(score, row, column, oldest, blocks, 0, WINDOW, BLOCK)
    base = gl.max(score, 1) * factor  # what sums are relative to
    weight = _weigh(score, factor, base)
    packed = _pack(weight)
    total = _sum(weight, score_rows)
    acc = ()
    for _ in gl.static_range(PIECES):
        acc += (no_value,)  # type: ignore[assignment]
    # What the last tile and the one before it do to the sums; every variable made anew, or a loop would not carry it.
    part = gl.zeros([HALF, PIECE], gl.float32, out_layout)
    decay = gl.full([HALF], 1.0, gl.float32, score_rows)
    share = gl.full([HALF], 1.0, gl.float32, score_rows)
    old_decay = gl.full([HALF], 1.0, gl.float32, score_rows)
    old_share = gl.full([HALF], 0.0, gl.float32, score_rows)
    steps = _steps(blocks, KEYS, BLOCK)
    mbarrier.wait(k_full.index(1), 0, pred=steps > 1)

    for step in range(1, steps):
        slot = step % STAGES
        last = (step - 1) % STAGES
        if PIECES == 1:
            score = warpgroup_mma(query, k_tiles.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
            acc = _add(acc, 0, part, old_decay, old_share)
            mbarrier.wait(v_full.index(last), (step - 1) // STAGES & 1)
            part = _multiply(packed, v_tiles.index(last), no_value)
            score = warpgroup_mma_wait(1, deps=(score,))
        else:
            mbarrier.wait(v_full.index(last), (step - 1) // STAGES & 1)
            acc = _add_in_turns(acc, packed, v_tiles.index(last), no_value, decay, share)
            warpgroup_barrier()
            mbarrier.arrive(v_free.index(last), count=1)
            score = warpgroup_mma(query, k_tiles.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=(score,))
        warpgroup_barrier()
        mbarrier.arrive(k_free.index(slot), count=1)
        score = _cap(score, cap, TANH)
        score = _see(score, row, column, oldest, blocks, step, WINDOW, BLOCK)
        peak = gl.max(score, 1) * factor
        if WINDOW:  # it may see nothing of this tile
            peak = gl.where(peak == float("-inf"), base, peak)
        weight = _weigh(score, factor, peak)
        new_base = gl.where(peak > base + REACH, peak, base)
        next_decay = gl.exp2(base - new_base)
        next_share = gl.exp2(peak - new_base)
        base = new_base
        total = total * next_decay + _sum(weight, score_rows) * next_share
        # The assembler moves the wait for the value product up, before the weights, if nothing that branches stands
        # between. So the wait for the next keys is here.
        ahead = step + 1
        mbarrier.wait(k_full.index(ahead % STAGES), ahead // STAGES & 1, pred=ahead < steps)
        if PIECES == 1:
            part, weight, packed = warpgroup_mma_wait(0, deps=(part, weight, packed))
            warpgroup_barrier()
            mbarrier.arrive(v_free.index(last), count=1)
        packed = _pack(weight)
        old_share = share
        old_decay = decay
        share = next_share
        decay = next_decay

    if PIECES == 1:
        acc = _add(acc, 0, part, old_decay, old_share)
    last = (steps - 1) % STAGES
    mbarrier.wait(v_full.index(last), (steps - 1) // STAGES & 1)
    acc = _add_in_turns(acc, packed, v_tiles.index(last), no_value, decay, share)

    if (LSE or SINKS) and TANH == "none":
        base += gl.load(shift_at[0] + row) * scale_log2
    if SINKS:  # only now: weights that were small beside a sink's would lose digits in 8 bits
        sink = gl.load(sink_at[0]).to(gl.float32) * LOG2_E
        whole_base = gl.maximum(base, sink)
        decay = gl.exp2(base - whole_base)
        total = total * decay + gl.exp2(sink - whole_base + TOP_LOG2)
        v_scale *= decay
        base = whole_base
    out_token = first_token + half * HALF + gl.arange(0, HALF, layout=out_rows)
    present = (out_token >= 0) & (out_token < q_len)
    out_at = out + out_token.to(gl.int64)[:, None] * out_stride
    for piece in gl.static_range(PIECES):
        dims = piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, out_layout))
        result = acc[piece] * gl.convert_layout(v_scale / total, out_rows)[:, None]
        gl.store(out_at + dims[None, :], result.to(out.dtype.element_ty), mask=present[:, None] & (dims < DV)[None, :])
    if LSE:
        token = row + first_token
        gl.store(lse + token, (base - TOP_LOG2 + gl.log2(total)) * LN2, mask=(token >= 0) & (token < q_len))
