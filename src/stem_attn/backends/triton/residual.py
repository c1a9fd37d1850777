"""Attention with `residual="mean"` on the GPU: two launches make the means and mark what rows keep, then attention.

The Hopper kernel reads the means itself. After the portable one another launch merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton import attention
from stem_attn.backends.triton.attention import addressable, attend_part, rows_of
from stem_attn.backends.triton.attention_launches import Operands, launch_hopper, portable_tile
from stem_attn.backends.triton.devices import has_copy_engine
from stem_attn.backends.triton.launch import Launch, on_device
from stem_attn.backends.triton.layouts import Layouts, alignment_of, layouts_of, padded, unit_stride
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
        part_lse = lse if len(call.parts) == 1 else None
        if _attend_in_one(call, part, selection, part_out, part_lse):
            continue
        if part_lse is None:
            part_lse = torch.empty(part.q.shape[:3], dtype=torch.float32, device=part.q.device)
        attend_part(call, part, selection, part_out, part_lse)
        merge_means(call, part, selection, part_out, part_lse)


def _attend_in_one(call: Call, part: Part, selection: BlockSelection, out: Tensor, lse: Tensor | None) -> bool:
    """Attend over the kept blocks and the means in one launch of the Hopper kernel, if it can; tell whether it did."""
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    page_size = call.layout.page_size
    # Beyond, its tiles are smaller than blocks.
    if max(q.shape[3], v.shape[3]) > 128 or not attention.hopper_fits(q, k, v, call.block_size, page_size):
        return False
    rows = rows_of(selection), selection.counts
    tables = _tables_of(q, k, v, *rows, selection.grid, page_size)
    with on_device(q.device):
        k_means, v_means, kept = tables.run(q, k, v, part.pages, *rows)
    means = (*(x.unflatten(0, (q.shape[0], k.shape[1], -1)) for x in (k_means, v_means)), kept)
    launch_hopper(Operands(call, q, k, v, scale, *rows, out, lse, part.k_len, part.pages, means=means))
    return True


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
    page_size = 0 if part.pages is None else k.shape[2]
    logits = Logits(scale, call.softcap)  # sinks are in lse
    tables = _tables_of(q, k, v, indices, selection.counts, selection.grid, page_size)
    merged = q, k, v, out, indices, selection.counts
    key = layouts_of(*merged), alignment_of(*merged), q.dtype, q.device
    merge = _merge_launch(*key, selection.grid, logits, tile)
    with on_device(q.device):
        k_means, v_means, kept = tables.run(q, k, v, part.pages, indices, selection.counts)
        inputs: tuple[Any, ...] = (k_means, v_means)
        if has_copy_engine(q.device):
            inputs = tuple(TensorDescriptor(x, x.shape, x.stride(), [tile.keys, x.shape[1]]) for x in inputs)
        merge(q, out, lse, selection.counts, kept, *inputs)


def _columns(grid: BlockGrid) -> int:
    """Return the blocks that the tables of means and of kept bits have room for, a multiple of any tile."""
    return -(-grid.k_blocks // 128) * 128


def _tables_of(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, grid: BlockGrid, page_size: int
) -> MeansLaunches:
    tensors = q, k, v, indices, counts
    return _means_launches(layouts_of(*tensors), alignment_of(*tensors), q.dtype, q.device, grid, page_size)


@lru_cache(maxsize=256)
def _means_launches(
    layouts: Layouts,
    alignment: tuple[bool, ...],
    dtype: torch.dtype,
    device: torch.device,
    grid: BlockGrid,
    page_size: int,
) -> MeansLaunches:
    # Kernels are compiled for dtypes and alignments, and loaded on a device.
    return MeansLaunches(layouts, grid, page_size)


class MeansLaunches:
    """All that the shapes and strides of a call decide about its tables of means and of kept bits.

    Args:
        layouts: Of q, k, v, indices and counts.
        grid: The geometry of the rows.
        page_size: Tokens a page of k and v, or 0.
    """

    def __init__(self, layouts: Layouts, grid: BlockGrid, page_size: int) -> None:
        (batch, heads, _, dim), kv_heads, v_dim = layouts[0][0], layouts[1][0][1], layouts[2][0][3]
        strides = [layout[1] for layout in layouts]
        size, columns = grid.block_size, _columns(grid)
        self.dim, self.v_dim = padded(dim), padded(v_dim)
        self.means_rows = batch * kv_heads * columns
        self.kept_shape = (batch, heads, grid.q_blocks, columns // 32)
        self.means = Launch(
            means_kernel,
            (columns, batch * kv_heads, 2),
            (strides[1], strides[2], kv_heads, grid.k_len // size, columns),
            # 8 numbers a thread: 16 bytes.
            {
                **_padding(dim, v_dim),
                "BLOCK": size,
                "TOKENS": min(max(MEANS_WARPS * 256 // max(self.dim, self.v_dim), 1), size),
                "PAGE": page_size,
            },
            num_warps=MEANS_WARPS,
        )
        # Not the width alone, which follows from a budget: lengths that share a power of two share a kernel.
        slots = triton.next_power_of_2(max(layouts[3][0][3], grid.k_blocks))
        self.mark = Launch(
            mark_kernel,
            (grid.q_blocks, heads, batch),
            (*strides[3][:3], *strides[4], columns // 32),
            {"SLOTS": slots},
            num_warps=min(max(slots // 256, 1), 8),
        )

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, indices: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make the tables on the current device and stream.

        Returns:
            Mean keys [B * Hkv * columns, D_PAD] and values [.., DV_PAD], and int32 [B, Hq, R, columns / 32], a bit for
            every block that a row keeps.
        """
        k_means, v_means = q.new_empty((self.means_rows, self.dim)), q.new_empty((self.means_rows, self.v_dim))
        kept = torch.zeros(self.kept_shape, dtype=torch.int32, device=q.device)
        self.means(k, v, k_means, v_means, counts if pages is None else pages)
        self.mark(indices, counts, kept)
        return k_means, v_means, kept


def _padding(dim: int, v_dim: int) -> dict[str, int]:
    return {"D": dim, "DV": v_dim, "D_PAD": padded(dim), "DV_PAD": padded(v_dim)}


@lru_cache(maxsize=256)
def _merge_launch(
    layouts: Layouts,
    alignment: tuple[bool, ...],
    dtype: torch.dtype,
    device: torch.device,
    grid: BlockGrid,
    logits: Logits,
    tile: Tile,
) -> Launch:
    """Make the launch of the merge that calls of equal layouts of q, k, v, out, indices and counts share."""
    (batch, heads, q_len, dim), kv_heads, v_dim = layouts[0][0], layouts[1][0][1], layouts[2][0][3]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None:  # not every target knows the option
        options["maxnreg"] = tile.registers
    columns = _columns(grid)
    return Launch(
        merge_kernel,
        (grid.q_blocks, heads, batch),
        (
            layouts[0][1][:3],
            layouts[3][1][:3],
            *layouts[5][1],
            heads // kv_heads,
            q_len,
            grid.offset,
            columns,
            columns // 32,
            logits.factor,
            logits.cap,
        ),
        {
            **_padding(dim, v_dim),
            "LOG2_BLOCK": grid.block_size.bit_length() - 1,
            "TILE": tile.keys,
            "TMA": has_copy_engine(device),
            "TANH": logits.tanh(dtype, device),
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        },
        **options,
    )
