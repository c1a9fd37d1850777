"""Launch the kernels of an audit: some rows attend exactly, and are compared with what was kept."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from stem_attn.backends.triton.attention import addressable
from stem_attn.backends.triton.exact_rows_kernel import compare_kernel, exact_kernel
from stem_attn.backends.triton.launch import on_device
from stem_attn.backends.triton.layouts import padded, unit_stride
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.tiles import choose_exact_rows_tile
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Part

ROWS = 32
"""Sampled queries a program."""
PROGRAMS = 512
"""About how many the work is cut into: a few for every multiprocessor."""
CHUNKS = 64
"""At most, of the keys: one program adds up what they give."""


def compare_rows(call: Call, part: Part, selection: BlockSelection, out: Tensor, places: Tensor) -> Tensor:
    """See `Backend.compare_rows`."""
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    (batch, heads, _, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[3]
    group, sampled, size = heads // kv_heads, places.shape[2], call.block_size
    grid, rows = call.grid(part), ROWS
    tile = choose_exact_rows_tile(block_size=size, head_dim=padded(max(dim, v_dim)), item_bytes=q.element_size())
    keys = tile.keys
    page_size = 0 if part.pages is None else k.shape[2]
    tiles = triton.cdiv(part.k_len, keys)
    row_programs = triton.cdiv(group * sampled, rows) * batch * kv_heads
    chunk_tiles = triton.cdiv(tiles, min(triton.cdiv(PROGRAMS, row_programs), CHUNKS))
    chunks = triton.cdiv(tiles, chunk_tiles)
    logits = Logits(scale, call.softcap)
    places = places.contiguous()

    def numbers(*shape: int) -> Tensor:
        return torch.empty(batch, heads, sampled, *shape, dtype=torch.float32, device=q.device)

    sums = numbers(tiles), numbers(tiles), numbers(chunks), numbers(chunks), numbers(chunks, padded(v_dim))
    found = torch.empty(3, *places.shape, dtype=torch.float32, device=q.device)
    indices = unit_stride(selection.indices)
    with on_device(q.device):
        exact_kernel[(chunks, triton.cdiv(group * sampled, rows), batch * kv_heads)](
            q, k, v, places, places if part.pages is None else part.pages, *sums,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], kv_heads, group, sampled, grid.offset, part.k_len,
            tiles, chunk_tiles, logits.factor, logits.cap, call.window or 0,
            D=dim, DV=v_dim, D_PAD=padded(dim), DV_PAD=padded(v_dim), ROWS=rows, KEYS=keys, PAGE=page_size,
            WINDOW=call.window is not None, TANH="none" if call.softcap is None else "exact",
            HALVES=q.dtype != torch.float32, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        compare_kernel[(sampled, heads, batch)](
            out, indices, selection.counts, sinks_of(call.sinks, selection.counts), places, *sums, found,
            out.stride()[:3], *indices.stride()[:3], *selection.counts.stride(),
            grid.offset, grid.first_block, tiles, chunks, chunk_tiles,
            DV=v_dim, DV_PAD=padded(v_dim), BLOCK=size, KEYS=keys, SLOTS=128,
            CHUNKS=triton.next_power_of_2(chunks), SINKS=call.sinks is not None,
        )  # fmt: skip
    return found
