"""The attention kernel with 8-bit products (e4m3), in plain Triton, for Hopper.

One program computes one query block of one head over the row's list of key blocks, the diagonal one first. It reads what
`quantize_kernels` wrote: whole blocks, so it knows neither pages nor strides; values lie transposed, as the 8-bit
instruction wants them.

The tensor core adds 8-bit products in about 22 bits (14 of the sum's). So every block's product with the values is a
sum of its own, added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.launch_order import row_and_head
from stem_attn.backends.triton.tanh_kernel import tanh

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
WEIGHT_LOG2 = tl.constexpr(8.0)
"""Weights, at most 1, are multiplied with 2^8: e4m3 reaches from 2^-9 to 448, and 2^8 is exact."""


@triton.jit(
    do_not_specialize=[
        "index_batch",
        "index_head",
        "index_row",
        "count_batch",
        "count_head",
        "count_row",
        "rows",
        "lead",
        "q_len",
        "k_len",
    ],
    do_not_specialize_on_alignment=["sinks"],
)
def fp8_attention_kernel(
    q,  # descriptor of e4m3 [B, Hq, R * BLOCK, D], boxes of a block
    k,  # descriptor of e4m3 [B, Hkv, Kb * BLOCK, D], boxes of a block
    v,  # descriptor of e4m3 [B, Hkv, Kb * DV_PAD, BLOCK], boxes of a block
    q_scales,  # float32 [B, Hq, R * BLOCK], what a query's numbers are multiplied with
    kv_scales,  # float32 [2, B, Hkv], k's and v's
    unsafe,  # int32 [B, Hkv], whether a head is left to another kernel
    shifts,  # float32 [B, Hq, R * BLOCK], what a query's dot products lack; unused unless LSE, SINKS or a softcap
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
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    LSE: tl.constexpr,
    SINKS: tl.constexpr,
    TANH: tl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
):
    heads = tl.num_programs(0) // rows
    row, head = row_and_head(rows, lead)
    batch = tl.program_id(1)
    kv_heads = heads // group
    kv_head = head // group
    if tl.load(unsafe + batch * kv_heads + kv_head) != 0:
        return
    indices += batch.to(tl.int64) * index_batch + head.to(tl.int64) * index_head
    indices += row.to(tl.int64) * index_row
    count = tl.load(counts + batch * count_batch + head * count_head + row * count_row)
    offset = k_len - q_len
    # With a prefix the first row may start inside its block: its first tokens then have negative numbers.
    slot = tl.arange(0, BLOCK)
    token = (offset // BLOCK + row) * BLOCK - offset + slot
    present = (token >= 0) & (token < q_len)
    first_row = ((batch.to(tl.int64) * heads + head) * rows + row) * BLOCK
    dot_scale = tl.load(q_scales + first_row + slot) * tl.load(kv_scales + batch * kv_heads + kv_head)
    shift = tl.zeros([BLOCK], tl.float32)
    if LSE or SINKS or TANH != "none":
        shift = tl.load(shifts + first_row + slot)
    query = q.load([batch, head, row * BLOCK, 0]).reshape(BLOCK, D_PAD)

    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, DV_PAD], tl.float32)
    oldest = token + offset - window  # the last position that a query's window leaves out
    peak, total, acc = _walk(
        peak, total, acc, query, k, v, indices, count - 1, -1, slot, oldest, batch, kv_head, dot_scale, shift,
        scale_log2, tanh_factor, 1, D_PAD, DV_PAD, BLOCK, WINDOW, True, TANH,
    )  # fmt: skip
    peak, total, acc = _walk(
        peak, total, acc, query, k, v, indices, count - 2, -1, slot, oldest, batch, kv_head, dot_scale, shift,
        scale_log2, tanh_factor, count - 1, D_PAD, DV_PAD, BLOCK, WINDOW, False, TANH,
    )  # fmt: skip

    if TANH == "none":
        peak += shift * scale_log2
    if SINKS:  # only now: weights that were small beside a sink's would lose digits in 8 bits
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        whole_peak = tl.maximum(peak, sink)
        decay = tl.exp2(peak - whole_peak)
        total = total * decay + tl.exp2(sink - whole_peak + WEIGHT_LOG2)
        acc = acc * decay[:, None]
        peak = whole_peak
    v_scale = tl.load(kv_scales + (tl.num_programs(1) + batch) * kv_heads + kv_head)
    acc = acc * (v_scale / total)[:, None]
    out += batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[1]
    dims = tl.arange(0, DV_PAD)
    out_at = out + token.to(tl.int64)[:, None] * out_strides[2] + dims
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=present[:, None] & (dims < DV))
    if LSE:
        lse += (batch.to(tl.int64) * heads + head) * q_len
        tl.store(lse + token, (peak - WEIGHT_LOG2 + tl.log2(total)) * LN2, mask=present)


@triton.jit
def _walk(
    peak,  # [BLOCK], the row maxima so far, log2 domain
    total,  # [BLOCK], the sums of weights
    acc,  # [BLOCK, DV_PAD], the weighted sums of values
    query, k, v, indices, start, step, slot, oldest, batch, kv_head, dot_scale, shift, scale_log2, tanh_factor,
    steps,  # blocks of the row's list from `start` on, in the direction of `step`
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, DIAGONAL: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    block = tl.load(indices + start, mask=steps > 0, other=0)
    for i in tl.range(0, steps):
        first = block * BLOCK
        # Read one block ahead: the address of the next load must not wait for memory.
        block = tl.load(indices + start + (i + 1) * step, mask=i + 1 < steps, other=0)
        key = k.load([batch, kv_head, first, 0]).reshape(BLOCK, D_PAD)
        score = tl.dot(query, key.T)
        if TANH != "none":
            score = tanh(score * (dot_scale * tanh_factor)[:, None] + (shift * tanh_factor)[:, None], TANH)
            factor = scale_log2 + tl.zeros_like(dot_scale)
        else:
            factor = dot_scale * scale_log2
        if DIAGONAL:
            score = tl.where(slot[None, :] <= slot[:, None], score, float("-inf"))
        if WINDOW:
            score = tl.where(slot[None, :] > (oldest - first)[:, None], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor[:, None] - (new_peak - WEIGHT_LOG2)[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weight, 1)
        value = v.load([batch, kv_head, first // BLOCK * DV_PAD, 0]).reshape(DV_PAD, BLOCK)
        acc = acc * decay[:, None] + tl.dot(weight.to(tl.float8e4nv), value.T)
        peak = new_peak
    return peak, total, acc
