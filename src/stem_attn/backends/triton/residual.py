"""Attention with `residual="mean"` on the GPU: the attention kernels, then three launches that merge the means."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.attention import (
    addressable,
    attend_part,
    has_copy_engine,
    padded,
    portable_tile,
    unit_stride,
)
from stem_attn.backends.triton.launch import Launch, on_device
from stem_attn.backends.triton.logits import Logits
from stem_attn.backends.triton.residual_kernel import mark_kernel, means_kernel, merge_kernel
from stem_attn.backends.triton.tiles import Tile
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Part

MEANS_WARPS = 4


def attend(call: Call, selections: Sequence[BlockSelection], out: Tensor, lse: Tensor | None) -> None:
    """Attend over the kept blocks and the means of the pruned ones, part by part; see `Backend.attend`."""
    for part, selection in zip(call.parts, selections, strict=True):
        part_out = out[:, :, part.tokens]
        whole = lse is not None and len(call.parts) == 1
        part_lse = lse if whole else torch.empty(part.q.shape[:3], dtype=torch.float32, device=part.q.device)
        assert part_lse is not None
        attend_part(call, part, selection, part_out, part_lse)
        merge_means(call, part, selection, part_out, part_lse)


def merge_means(
    call: Call, part: Part, selection: BlockSelection, out: Tensor, lse: Tensor, tile: Tile | None = None
) -> None:
    """Add the pruned past blocks, as their means, to attention over the kept ones.

    Args:
        call: The call.
        part: One of its parts.
        selection: The kept blocks.
        out: [B, Hq, Tq, Dv], attention over the kept blocks, last stride 1; changed in place.
        lse: float32 [B, Hq, Tq] contiguous, the natural log-sum-exp of their logits; changed in place.
        tile: Launch choices of the merge; default: the portable attention kernel's.
    """
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    indices = unit_stride(selection.indices)
    tile = tile or portable_tile(q, v, selection.block_size)
    inputs = q, k, v, out, indices, selection.counts
    layouts = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in inputs)
    page_size = 0 if part.pages is None else k.shape[2]
    logits = Logits(scale, call.softcap)  # sinks are in lse
    launches = _merging(layouts, q.dtype, q.device, selection.grid, page_size, logits, tile)
    with on_device(q.device):
        launches.run(q, k, v, part.pages, indices, selection.counts, out, lse)


@lru_cache(maxsize=256)
def _merging(*args: Any) -> MergeLaunches:
    return MergeLaunches(*args)


class MergeLaunches:
    """All that the shapes and strides of a call decide: sizes and launches.

    Args:
        layouts: Shape, strides, and whether it starts at a multiple of 16 bytes, of q, k, v, out, indices and counts.
        dtype: Of q.
        device: Of q.
        grid: The geometry of the rows.
        page_size: Tokens a page of k and v, or 0.
        logits: Their factor is positive.
        tile: Launch choices of the merge.
    """

    def __init__(
        self,
        layouts: tuple[tuple[torch.Size, tuple[int, ...], bool], ...],
        dtype: torch.dtype,
        device: torch.device,
        grid: BlockGrid,
        page_size: int,
        logits: Logits,
        tile: Tile,
    ) -> None:
        (batch, heads, q_len, dim), kv_heads, v_dim = layouts[0][0], layouts[1][0][1], layouts[2][0][3]
        strides = [layout[1] for layout in layouts]
        size, whole = grid.block_size, grid.k_len // grid.block_size
        self.dim, self.v_dim = padded(dim), padded(v_dim)
        self.means_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        self.tile, self.tma = tile, has_copy_engine(device)
        columns = triton.cdiv(max(whole, 1), tile.keys) * tile.keys
        words = triton.cdiv(max(columns, grid.k_blocks), 32)
        self.means_rows = batch * kv_heads * columns
        self.kept_shape = (batch, heads, grid.q_blocks, words)
        padding = {"D": dim, "DV": v_dim, "D_PAD": self.dim, "DV_PAD": self.v_dim}
        self.means = Launch(
            means_kernel,
            (columns, batch * kv_heads, 2),
            (strides[1], strides[2], kv_heads, whole, columns),
            # 8 numbers a thread: 16 bytes.
            {
                **padding,
                "BLOCK": size,
                "TOKENS": min(max(MEANS_WARPS * 256 // max(self.dim, self.v_dim), 1), size),
                "PAGE": page_size,
            },
            num_warps=MEANS_WARPS,
        )
        rows = (grid.q_blocks, heads, batch)
        # Not the width alone, which follows from a budget: lengths that share a power of two share a kernel.
        slots = triton.next_power_of_2(max(layouts[4][0][3], grid.k_blocks))
        self.mark = Launch(
            mark_kernel,
            rows,
            (*strides[4][:3], *strides[5], words),
            {"SLOTS": slots},
            num_warps=min(max(slots // 256, 1), 8),
        )
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if tile.registers is not None:  # not every target knows the option
            options["maxnreg"] = tile.registers
        self.merge = Launch(
            merge_kernel,
            rows,
            (
                strides[0][:3],
                strides[3][:3],
                *strides[5],
                heads // kv_heads,
                q_len,
                grid.offset,
                columns,
                words,
                logits.factor,
                logits.cap,
            ),
            {
                **padding,
                "LOG2_BLOCK": size.bit_length() - 1,
                "TILE": tile.keys,
                "TMA": self.tma,
                "TANH": logits.tanh(dtype, device),
                "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            },
            **options,
        )

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor | None,
        indices: Tensor,
        counts: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Merge the means into `out` and `lse` on the current device and stream; see `merge_means`."""
        k_means = q.new_empty((self.means_rows, self.dim), dtype=self.means_dtype)
        v_means = q.new_empty((self.means_rows, self.v_dim))
        k_powers = q.new_empty(self.means_rows, dtype=torch.float32)
        kept = torch.zeros(self.kept_shape, dtype=torch.int32, device=q.device)
        self.means(k, v, k_means, k_powers, v_means, counts if pages is None else pages)
        self.mark(indices, counts, kept)
        tables: tuple[Any, ...] = (k_means, v_means)
        if self.tma:
            tables = tuple(TensorDescriptor(x, x.shape, x.stride(), [self.tile.keys, x.shape[1]]) for x in tables)
        self.merge(q, out, lse, counts, kept, k_powers, *tables)
