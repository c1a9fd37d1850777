"""The kernels of an audit: attend exactly with single rows, and compare that with what was kept and what came out."""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attn.backends.triton.kernel_pages import load_pages, token_offset
from stem_attn.backends.triton.tanh_kernel import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["sampled", "offset", "k_len", "tiles", "chunk_tiles", "window"],
    do_not_specialize_on_alignment=["block_table"],
)
def exact_kernel(
    q,  # [B, Hq, Tq, D]
    k,  # [B, Hkv, Tk, D]; [pages, Hkv, PAGE, D] where paged, and then B = 1
    v,  # [B, Hkv, Tk, DV], likewise
    places,  # int64 [B, Hq, R] contiguous: the sampled queries
    block_table,  # int32 [pages of the sequence]; unused unless paged
    tile_peaks,  # float32 [B, Hq, R, tiles], powers of two; written up to the row's own tile, as what follows
    tile_sums,  # float32 [B, Hq, R, tiles], of weights over the tile's peak
    chunk_peaks,  # float32 [B, Hq, R, chunks]
    chunk_sums,  # float32 [B, Hq, R, chunks]
    chunk_outs,  # float32 [B, Hq, R, chunks, DV_PAD], sums of weighted values
    q_strides,  # (batch, head, token) in elements, as all strides here; the last one is 1
    k_strides,
    v_strides,
    kv_heads,
    group,  # query heads a KV head
    sampled,  # R
    offset,  # position of the first query among the keys
    k_len,
    tiles,
    chunk_tiles,
    factor,  # of a dot product, to give powers of two, or the argument of the tanh
    cap,  # of the tanh
    window,  # tokens; read only where WINDOW
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,  # powers of two
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # a tile
    PAGE: tl.constexpr,  # tokens a page of k and v; 0: not paged
    WINDOW: tl.constexpr,
    TANH: tl.constexpr,  # see `tanh`; "none": there is no softcap
    HALVES: tl.constexpr,  # of 16-bit inputs: a weight goes into products in two parts, so that it keeps its digits
):
    """Attend with ROWS rows of one KV head's queries to one chunk of keys."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < group * sampled
    head = kv_head * group + row // sampled
    slot = (batch * kv_heads * group + head) * sampled + row % sampled
    place = tl.load(places + slot, mask=real, other=0)
    position = tl.where(real, place + offset, -1)
    first_tile = chunk * chunk_tiles
    last_tile = tl.minimum(first_tile + chunk_tiles, tl.max(position) // KEYS + 1).to(tl.int32)

    dims = tl.arange(0, D_PAD)
    dims_v = tl.arange(0, DV_PAD)
    q_at = q + batch * q_strides[0] + (head * q_strides[1] + place * q_strides[2])[:, None] + dims
    query = tl.load(q_at, mask=real[:, None] & (dims < D), other=0.0)
    k += kv_head * k_strides[1]
    v += kv_head * v_strides[1]
    if PAGE == 0:
        k += batch * k_strides[0]
        v += batch * v_strides[0]

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for tile in range(first_tile, last_tile):
        key = tile * KEYS + tl.arange(0, KEYS)
        held = key < k_len
        page = key
        if PAGE > 0:
            page = load_pages(block_table, tile * KEYS, k_len, KEYS, PAGE)
        k_at = k + token_offset(key, page, k_strides, PAGE)[:, None] + dims
        score = tl.dot(query, tl.load(k_at, mask=held[:, None] & (dims < D), other=0.0).T, input_precision="ieee")
        score *= factor
        if TANH != "none":
            score = tanh(score, TANH) * cap
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > position[:, None] - window
        score = tl.where(seen, score, float("-inf"))
        tile_peak = tl.max(score, 1)
        base = tl.where(tile_peak == float("-inf"), 0.0, tile_peak)
        weight = tl.exp2(score - base[:, None])
        tile_sum = tl.sum(weight, 1)
        wanted = real & (tile * KEYS <= position)
        tl.store(tile_peaks + slot * tiles + tile, tile_peak, mask=wanted)
        tl.store(tile_sums + slot * tiles + tile, tile_sum, mask=wanted)

        new_peak = tl.maximum(peak, tile_peak)
        new_base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, share = tl.exp2(peak - new_base), tl.exp2(tile_peak - new_base)
        total = total * decay + tile_sum * share
        v_at = v + token_offset(key, page, v_strides, PAGE)[:, None] + dims_v
        value = tl.load(v_at, mask=held[:, None] & (dims_v < DV), other=0.0)
        weight *= share[:, None]
        high = weight.to(value.dtype)
        acc = tl.dot(high, value, acc * decay[:, None], input_precision="ieee")
        if HALVES:
            acc = tl.dot((weight - high.to(tl.float32)).to(value.dtype), value, acc, input_precision="ieee")
        peak = new_peak
    wanted = real & (first_tile * KEYS <= position)
    at = slot * chunks + chunk
    tl.store(chunk_peaks + at, peak, mask=wanted)
    tl.store(chunk_sums + at, total, mask=wanted)
    tl.store(chunk_outs + at[:, None] * DV_PAD + dims_v, acc, mask=wanted[:, None])


@triton.jit(
    do_not_specialize=["offset", "first_row", "tiles", "chunks", "chunk_tiles", "index_batch", "index_head",
                       "index_row", "count_batch", "count_head", "count_row"],
)  # fmt: skip
def compare_kernel(
    out,  # [B, Hq, Tq, DV], attention over the kept blocks
    indices,  # int32 [B, Hq, Qb, S]
    counts,  # int32 [B, Hq, Qb]
    sinks,  # [Hq], floating: a logit in the softmax's sum; unused unless SINKS
    places,  # as in `exact_kernel`, like the next five
    tile_peaks,
    tile_sums,
    chunk_peaks,
    chunk_sums,
    chunk_outs,
    found,  # float32 [3, B, Hq, R]: the kept share, the lost and the whole power of every row
    out_strides,
    index_batch,
    index_head,
    index_row,
    count_batch,
    count_head,
    count_row,
    offset,
    first_row,  # block of the selection's first row
    tiles,
    chunks,
    chunk_tiles,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SLOTS: tl.constexpr,  # read at once
    CHUNKS: tl.constexpr,  # a power of two, no fewer than the chunks
    SINKS: tl.constexpr,
):
    """Compare one row."""
    sampled, heads = tl.num_programs(0), tl.num_programs(1)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = (batch * heads + head) * sampled + tl.program_id(0)
    place = tl.load(places + slot)
    position = place + offset
    dims = tl.arange(0, DV_PAD)

    chunk = tl.arange(0, CHUNKS)
    reached = chunk * chunk_tiles * KEYS <= position
    peaks = tl.load(chunk_peaks + slot * chunks + chunk, mask=reached & (chunk < chunks), other=float("-inf"))
    sums = tl.load(chunk_sums + slot * chunks + chunk, mask=reached & (chunk < chunks), other=0.0)
    peak = tl.max(peaks)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp2(peaks - base)
    whole = tl.sum(sums * shares)
    outs = chunk_outs + (slot * chunks + chunk)[:, None] * DV_PAD + dims
    exact = tl.sum(tl.load(outs, mask=(reached & (chunk < chunks))[:, None], other=0.0) * shares[:, None], 0)

    row = position // BLOCK - first_row
    indices += batch * index_batch + head * index_head + row * index_row
    count = tl.load(counts + batch * count_batch + head * count_head + row * count_row)
    kept = 0.0
    for start in range(0, count, SLOTS):
        n = start + tl.arange(0, SLOTS)
        block = tl.load(indices + n, mask=n < count, other=0)
        for part in tl.static_range(BLOCK // KEYS):
            tile = block * (BLOCK // KEYS) + part
            there = (n < count) & (tile * KEYS <= position)
            tile_peak = tl.load(tile_peaks + slot * tiles + tile, mask=there, other=float("-inf"))
            tile_sum = tl.load(tile_sums + slot * tiles + tile, mask=there, other=0.0)
            kept += tl.sum(tile_sum * tl.exp2(tile_peak - base))

    total, recall = whole, kept / whole
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        top = tl.maximum(peak, sink)
        exact *= tl.exp2(peak - top)
        total = whole * tl.exp2(peak - top) + tl.exp2(sink - top)
        recall = tl.where((whole == 0) & (total > 0), 1.0, recall)  # the sink takes all: nothing is lost
    exact /= total
    given = tl.load(out + batch * out_strides[0] + head * out_strides[1] + place * out_strides[2] + dims,
                    mask=dims < DV, other=0.0).to(tl.float32)  # fmt: skip
    rows = tl.num_programs(2) * heads * sampled
    tl.store(found + slot, recall)
    tl.store(found + rows + slot, tl.sum((given - exact) * (given - exact)))
    tl.store(found + 2 * rows + slot, tl.sum(exact * exact))
