"""The kernels of `residual="mean"`: average the blocks, mark the kept ones, and merge the others into the output.

Means are in the inputs' dtype, by definition, so their products with queries and weights are those of attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.kernel_pages import page_of, token_offset
from stem_attn.backends.triton.tanh_kernel import tanh

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["blocks", "columns", "kv_heads"],
    do_not_specialize_on_alignment=["block_table"],
)
def means_kernel(
    k,  # [B, Hkv, Tk, D]; [pages, Hkv, PAGE, D] where paged, and then B = 1
    v,  # [B, Hkv, Tk, DV], likewise
    k_means,  # [B * Hkv * columns, D_PAD], zeros past D and past the whole blocks, as v_means
    v_means,  # [B * Hkv * columns, DV_PAD]
    block_table,  # int32 [pages of the sequence]; unused unless paged
    k_strides,  # (batch, head, token, dim) in elements
    v_strides,
    kv_heads,
    blocks,  # whole key blocks
    columns,  # blocks, rounded up
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,  # how many are loaded at once; divides BLOCK
    PAGE: tl.constexpr,  # tokens a page of k and v; 0: not paged
):
    """Average the keys or the values of one block."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = head * columns + block
    if tl.program_id(2) == 0:
        k += head % kv_heads * k_strides[1]
        if PAGE == 0:
            k += head // kv_heads * k_strides[0]
        k_mean = _mean(k, block, blocks, block_table, k_strides, D, D_PAD, BLOCK, TOKENS, PAGE)
        tl.store(k_means + row * D_PAD + tl.arange(0, D_PAD), k_mean.to(k_means.dtype.element_ty))
    else:
        v += head % kv_heads * v_strides[1]
        if PAGE == 0:
            v += head // kv_heads * v_strides[0]
        v_mean = _mean(v, block, blocks, block_table, v_strides, DV, DV_PAD, BLOCK, TOKENS, PAGE)
        tl.store(v_means + row * DV_PAD + tl.arange(0, DV_PAD), v_mean.to(v_means.dtype.element_ty))


@triton.jit
def _mean(
    x, block, blocks, block_table, strides,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Return the mean of a block's tokens, float32 [D_PAD]; zeros for what is no whole block."""
    dims = tl.arange(0, D_PAD)
    x += dims.to(tl.int64)[None, :] * strides[3]
    sums = tl.zeros([TOKENS, D_PAD], tl.float32)
    for first in tl.static_range(0, BLOCK, TOKENS):
        token = (block * BLOCK + first + tl.arange(0, TOKENS))[:, None]
        held = token < blocks * BLOCK
        page = page_of(block_table, token, held, PAGE)
        at = x + token_offset(token, page, strides, PAGE)
        sums += tl.load(at, mask=held & (dims < D)[None, :], other=0.0).to(tl.float32)
    return tl.sum(sums, 0) / BLOCK


@triton.jit(
    do_not_specialize=["index_batch", "index_head", "index_row", "count_batch", "count_head", "count_row", "words"]
)
def mark_kernel(
    indices,  # int32 [B, Hq, R, S], last stride 1
    counts,  # int32 [B, Hq, R]
    kept,  # int32 [B, Hq, R, words], zeros before: a bit a key block
    index_batch,  # strides of indices and counts, numbers of their own: a tuple's cannot be left unspecialised
    index_head,
    index_row,
    count_batch,
    count_head,
    count_row,
    words,
    SLOTS: tl.constexpr,  # a power of two, at least S
):
    """Set the bits of the blocks that a row keeps."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + batch * count_batch + head * count_head + row * count_row)
    indices += batch * index_batch + head * index_head + row * index_row
    kept += ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + row) * words
    slot = tl.arange(0, SLOTS)
    block = tl.load(indices + slot, mask=slot < count, other=0)
    tl.atomic_or(kept + block // 32, 1 << (block % 32), mask=slot < count, sem="relaxed")


@triton.jit(
    do_not_specialize=["count_batch", "count_head", "count_row", "q_len", "offset", "columns", "words"],
)
def merge_kernel(
    q,  # [B, Hq, Tq, D], last stride 1
    out,  # [B, Hq, Tq, DV], last stride 1, attention over the kept blocks; overwritten
    lse,  # float32 [B, Hq, Tq] contiguous, natural logarithm; overwritten
    counts,  # int32 [B, Hq, R]
    kept,  # int32 [B, Hq, R, words], a bit a key block
    k_means,  # [B * Hkv * columns, D_PAD]: a pointer, or a tensor descriptor where TMA
    v_means,  # [B * Hkv * columns, DV_PAD], likewise
    q_strides,  # (batch, head, token) in elements
    out_strides,
    count_batch,  # as of `mark_kernel`
    count_head,
    count_row,
    group,  # query heads a KV head
    q_len,
    offset,  # tokens before the first query
    columns,  # blocks that have means, rounded up to a multiple of TILE
    words,  # columns / 32
    scale_log2,  # logit factor times log2(e); positive; over the softcap instead, where there is a tanh
    cap_log2,  # softcap times log2(e); read only where there is a tanh
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,  # of the tokens a block
    TILE: tl.constexpr,  # blocks a step
    TMA: tl.constexpr,
    TANH: tl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
    PRECISION: tl.constexpr,  # of the products: "tf32" (ignored for 16-bit inputs) or "ieee"
):
    """Merge a query block's output with the means of its pruned past blocks, by an online softmax."""
    BLOCK: tl.constexpr = 1 << LOG2_BLOCK
    rows = tl.num_programs(0)
    row = rows - 1 - tl.program_id(0)  # the last rows, which have the most blocks, start first
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    past = offset // BLOCK + row
    count = tl.load(counts + batch * count_batch + head * count_head + row * count_row)
    if count > past:  # nothing is pruned: out stays as it is, to the bit
        return
    kept += ((batch * heads + head) * rows + row) * words
    first_mean = ((batch * heads + head) // group * columns).to(tl.int32)

    # With a prefix the first row may start inside its block: its first tokens then have negative numbers.
    token = past * BLOCK - offset + tl.arange(0, BLOCK)
    present = (token >= 0) & (token < q_len)
    dims = tl.arange(0, D_PAD)
    dims_v = tl.arange(0, DV_PAD)
    q += batch * q_strides[0] + head * q_strides[1] + token.to(tl.int64)[:, None] * q_strides[2]
    query = tl.load(q + dims, mask=present[:, None] & (dims < D), other=0.0)

    # What the kept blocks gave counts as one item, whose value is added last. Weights are over BLOCK until the end.
    lse += (batch * heads + head) * q_len + token
    kept_peak = tl.load(lse, mask=present, other=0.0) * LOG2E - LOG2_BLOCK
    peak = kept_peak
    total = tl.full([BLOCK], 1.0, tl.float32)
    acc = tl.zeros([BLOCK, DV_PAD], tl.float32)

    column = tl.arange(0, TILE)
    word = tl.load(kept + column // 32)
    for first in tl.range(0, past, TILE):
        pruned = ((word >> (column % 32)) & 1 == 0) & (column < past)
        bias = tl.where(pruned, 0.0, float("-inf"))
        if TMA:
            key = k_means.load([first_mean + first, 0])
        else:
            key = tl.load(k_means + (first_mean + column).to(tl.int64)[:, None] * D_PAD + dims)
        if TANH == "none":
            score = tl.dot(query, key.T, input_precision=PRECISION) + bias[None, :]
            new_peak = tl.maximum(peak, tl.max(score, 1) * scale_log2)
            weight = tl.exp2(score * scale_log2 - new_peak[:, None])
        else:
            score = tl.dot(query, key.T, input_precision=PRECISION) * scale_log2
            score = tanh(score, TANH) + bias[None, :]
            new_peak = tl.maximum(peak, tl.max(score, 1) * cap_log2)
            weight = tl.exp2(score * cap_log2 - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        if TMA:
            value = v_means.load([first_mean + first, 0])
        else:
            value = tl.load(v_means + (first_mean + column).to(tl.int64)[:, None] * DV_PAD + dims_v)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        peak = new_peak
        # Read one tile ahead.
        column += TILE
        word = tl.load(kept + column // 32, mask=column < columns, other=0)

    out += batch * out_strides[0] + head * out_strides[1] + token.to(tl.int64)[:, None] * out_strides[2]
    kept_value = tl.load(out + dims_v, mask=present[:, None] & (dims_v < DV), other=0.0)
    acc = (acc + kept_value * tl.exp2(kept_peak - peak)[:, None]) / total[:, None]
    tl.store(out + dims_v, acc.to(out.dtype.element_ty), mask=present[:, None] & (dims_v < DV))
    tl.store(lse, (peak + tl.log2(total) + LOG2_BLOCK) * LN2, mask=present)
