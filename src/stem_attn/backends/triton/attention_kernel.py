"""The attention kernel in plain Triton: any GPU that Triton compiles for, and Triton's CPU interpreter.

One program computes one query block of one head. It walks that row's list of key blocks with an online softmax in
the log2 domain; only the tiles that can hold masked keys (the diagonal block, or every tile under a window) pay for
a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.kernel_pages import load_pages, token_offset
from stem_attn.backends.triton.launch_order import UNSPECIALISED, row_and_head
from stem_attn.backends.triton.tanh_kernel import tanh

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=(*UNSPECIALISED, "table_stride"),
    # The tables of packed sequences lie one after the other, wherever that is.
    do_not_specialize_on_alignment=["row_sequence", "first_rows", "q_starts", "k_starts", "block_table", "sinks"],
)
def attention_kernel(
    q,  # [B, Hq, Tq, D]: a pointer, or a tensor descriptor where TMA; packed: B = 1 and T = all tokens
    k,  # [B, Hkv, Tk, D], likewise; [pages, Hkv, PAGE, D] where paged
    v,  # [B, Hkv, Tk, DV], likewise
    out,  # [B, Hq, Tq, DV]
    lse,  # float32 [B, Hq, Tq] contiguous, natural logarithm; unused unless LSE
    indices,  # int32 [B, Hq, R, S], last stride 1
    counts,  # int32 [B, Hq, R]
    row_sequence,  # int32 [R], the sequence of each row; PACKED only, like the next three
    first_rows,  # int32 [sequences], the first row of each sequence
    q_starts,  # int32 [sequences + 1], cumulative query tokens
    k_starts,  # int32 [sequences + 1], cumulative key tokens
    block_table,  # int32 [sequences, pages of the longest], last stride 1; unused unless paged
    sinks,  # [Hq], floating: a logit in the softmax's sum; unused unless SINKS
    q_strides,  # (batch, head, token) in elements, as all strides here
    k_strides,
    v_strides,
    out_strides,
    index_batch,  # strides of indices and counts, numbers of their own: a tuple's cannot be left unspecialised
    index_head,
    index_row,
    count_batch,
    count_head,
    count_row,
    table_stride,  # from one sequence to the next
    rows,
    lead,  # rows that start first
    group,  # query heads a KV head
    q_len,  # query tokens of a batch row; all tokens where PACKED
    k_len,  # not read where PACKED
    scale_log2,  # logit factor times log2(e), positive; of the tanh where there is one, and then the softcap's
    tanh_factor,  # logit factor over the softcap; read only where there is one
    window,  # tokens; read only where WINDOW
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens a block
    KEYS: tl.constexpr,  # keys a tile; divides BLOCK
    TMA: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,  # tokens a page of k and v, which are then PACKED; 0: not paged. TMA: a multiple of KEYS
    WINDOW: tl.constexpr,
    LSE: tl.constexpr,
    SINKS: tl.constexpr,
    TANH: tl.constexpr,  # how a softcap's tanh is computed, see `tanh`; "none": there is no softcap
    PRECISION: tl.constexpr,  # of the products: "tf32" (ignored for 16-bit inputs) or "ieee"
    MAY_SKIP: tl.constexpr,  # whether a row may keep nothing: what it would write is then left alone
):
    heads = tl.num_programs(0) // rows
    row_slot, head = row_and_head(rows, lead)
    head = head.to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    kv_head = head // group
    indices += batch * index_batch + head * index_head + row_slot.to(tl.int64) * index_row
    count = tl.load(counts + batch * count_batch + head * count_head + row_slot * count_row)
    if MAY_SKIP:  # noqa: SIM102 - known when it is compiled
        if count == 0:
            return
    lse += (batch * heads + head) * q_len

    if PACKED:
        sequence = tl.load(row_sequence + row_slot)
        row = row_slot - tl.load(first_rows + sequence)
        q_start = tl.load(q_starts + sequence)
        k_start = tl.load(k_starts + sequence)
        q_len = tl.load(q_starts + sequence + 1) - q_start
        k_len = tl.load(k_starts + sequence + 1) - k_start
        if PAGE > 0:
            k_start = tl.full((), 0, tl.int32)
            block_table += sequence.to(tl.int64) * table_stride
    else:
        row = row_slot
        q_start = tl.full((), 0, tl.int32)
        k_start = tl.full((), 0, tl.int32)

    # With a prefix the first row may start inside its block: its first tokens then have negative numbers.
    offset = k_len - q_len
    token = (offset // BLOCK + row) * BLOCK - offset + tl.arange(0, BLOCK)
    present = (token >= 0) & (token < q_len)
    dims = tl.arange(0, D_PAD)
    dims_v = tl.arange(0, DV_PAD)
    if TMA:
        first = q_start + (offset // BLOCK + row) * BLOCK - offset
        query = q.load([batch.to(tl.int32), head.to(tl.int32), first, 0]).reshape(BLOCK, D_PAD)
        keys = k
        values = v
    else:
        q += batch * q_strides[0] + head * q_strides[1] + (q_start + token).to(tl.int64)[:, None] * q_strides[2]
        query = tl.load(q + dims, mask=present[:, None] & (dims < D), other=0.0)
        keys = k + batch * k_strides[0] + kv_head * k_strides[1] + k_start.to(tl.int64) * k_strides[2]
        values = v + batch * v_strides[0] + kv_head * v_strides[1] + k_start.to(tl.int64) * v_strides[2]

    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, DV_PAD], tl.float32)
    PER_BLOCK: tl.constexpr = BLOCK // KEYS
    unmasked = 0
    if not WINDOW:
        unmasked = (count - 1) * PER_BLOCK
        peak, total, acc = _walk(
            peak, total, acc, query, keys, values, indices, 0, unmasked, token + offset,
            batch, kv_head, k_start, k_len, block_table, k_strides, v_strides, scale_log2, tanh_factor, window,
            D, DV, D_PAD, DV_PAD, BLOCK, KEYS, TMA, PACKED, PAGE, WINDOW, False, TANH, PRECISION,
        )  # fmt: skip
    peak, total, acc = _walk(
        peak, total, acc, query, keys, values, indices, unmasked, count * PER_BLOCK, token + offset,
        batch, kv_head, k_start, k_len, block_table, k_strides, v_strides, scale_log2, tanh_factor, window,
        D, DV, D_PAD, DV_PAD, BLOCK, KEYS, TMA, PACKED, PAGE, WINDOW, True, TANH, PRECISION,
    )  # fmt: skip

    if SINKS:  # only now: weights that were small beside a sink's would lose digits in 16 bits
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        whole_peak = tl.maximum(peak, sink)
        decay = tl.exp2(peak - whole_peak)
        total = total * decay + tl.exp2(sink - whole_peak)
        acc = acc * decay[:, None]
        peak = whole_peak
    acc = acc / total[:, None]
    out += batch * out_strides[0] + head * out_strides[1] + (q_start + token).to(tl.int64)[:, None] * out_strides[2]
    tl.store(out + dims_v, acc.to(out.dtype.element_ty), mask=present[:, None] & (dims_v < DV))
    if LSE:
        tl.store(lse + q_start + token, (peak + tl.log2(total)) * LN2, mask=present)


@triton.jit
def _walk(
    peak,  # [BLOCK], the row maxima so far, log2 domain
    total,  # [BLOCK], the sums of weights
    acc,  # [BLOCK, DV_PAD], the weighted sums of values
    query, keys, values, indices, start, stop,  # tiles [start, stop) of the row's list
    position,  # [BLOCK], absolute positions of the queries
    batch, kv_head, k_start, k_len, block_table, k_strides, v_strides, scale_log2, tanh_factor, window,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PER_BLOCK: tl.constexpr = BLOCK // KEYS
    dims = tl.arange(0, D_PAD)
    dims_v = tl.arange(0, DV_PAD)
    block = tl.load(indices + start // PER_BLOCK, mask=start < stop, other=0)
    page = block
    if PAGE > 0:
        page = load_pages(block_table, block * BLOCK + (start % PER_BLOCK) * KEYS, k_len, KEYS, PAGE)
        next_block = tl.load(indices + (start + 1) // PER_BLOCK, mask=start + 1 < stop, other=0)
    for tile in tl.range(start, stop):
        first = block * BLOCK + (tile % PER_BLOCK) * KEYS
        tile_page = page
        # Read one tile ahead, and two where pages are: the address of the next load must not wait for memory.
        if PAGE > 0:
            block = next_block
            page = load_pages(block_table, block * BLOCK + ((tile + 1) % PER_BLOCK) * KEYS, k_len, KEYS, PAGE)
            next_block = tl.load(indices + (tile + 2) // PER_BLOCK, mask=tile + 2 < stop, other=0)
        else:
            block = tl.load(indices + (tile + 1) // PER_BLOCK, mask=tile + 1 < stop, other=0)
        slot = first + tl.arange(0, KEYS)
        held = slot < k_len
        if PAGE > 0:
            outer = tile_page
            inner = first % PAGE
        else:
            outer = batch.to(tl.int32)
            inner = k_start + first
        if TMA:
            key = keys.load([outer, kv_head.to(tl.int32), inner, 0]).reshape(KEYS, D_PAD)
        else:
            key_at = keys + token_offset(slot, tile_page, k_strides, PAGE)[:, None] + dims
            if MASKED:
                key = tl.load(key_at, mask=held[:, None] & (dims < D), other=0.0)
            elif D_PAD > D:
                key = tl.load(key_at, mask=(dims < D)[None, :], other=0.0)
            else:
                key = tl.load(key_at)
        score = tl.dot(query, key.T, input_precision=PRECISION)
        if TANH != "none":
            score = tanh(score * tanh_factor, TANH)
        if MASKED:
            seen = slot[None, :] <= position[:, None]
            if WINDOW:
                seen &= slot[None, :] > position[:, None] - window
            score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1) * scale_log2)
        if WINDOW:  # a kept block may lie wholly outside a row's window
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            base = new_peak
        weight = tl.exp2(score * scale_log2 - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        if TMA:
            value = values.load([outer, kv_head.to(tl.int32), inner, 0]).reshape(KEYS, DV_PAD)
            if MASKED and PACKED:  # past the end lies another sequence, which may hold infinities
                value = tl.where(held[:, None], value, 0.0)
        else:
            value_at = values + token_offset(slot, tile_page, v_strides, PAGE)[:, None] + dims_v
            if MASKED:
                value = tl.load(value_at, mask=held[:, None] & (dims_v < DV), other=0.0)
            elif DV_PAD > DV:
                value = tl.load(value_at, mask=(dims_v < DV)[None, :], other=0.0)
            else:
                value = tl.load(value_at)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        peak = new_peak
    return peak, total, acc
