"""The launches of the attention kernels: their tensors, strides, descriptors, constants and grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.attention_kernel import attention_kernel
from stem_attn.backends.triton.boxes import Boxes
from stem_attn.backends.triton.devices import has_copy_engine
from stem_attn.backends.triton.launch import Launch, run_on
from stem_attn.backends.triton.launch_order import LEAD_ROWS
from stem_attn.backends.triton.layouts import Layouts, alignment_of, describable, described, layouts_of, padded
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.tiles import HopperTile, Tile, choose_hopper_tile, choose_tile
from stem_attn.call import Call


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """What one launch works on: a part of a call, or all of them packed, in a form that the kernels can address.

    Args:
        call: Whose properties the kernels compute.
        q: [B, Hq, T, D], last stride 1.
        k: [B, Hkv, Tk, D], or [pages, Hkv, page_size, D]; last stride 1.
        v: [B, Hkv, Tk, Dv], likewise.
        scale: Factor of the logits, positive: the kernels take maxima before they scale.
        indices: int32 [B, Hq, R, S], last stride 1; slots past a row's count are not read.
        counts: int32 [B, Hq, R].
        out: [B, Hq, T, Dv], last stride 1.
        lse: float32 [B, Hq, T] contiguous, or None.
        k_len: Tokens of the sequence, where there is one.
        block_table: int32 [sequences, pages of the longest], last stride 1, or the only sequence's row of it, which is
            all that the Hopper kernel takes; None where nothing is in pages.
        packing: Where several sequences' rows and tokens start, from `packing_of`; None for one part without pages, and
            on the Hopper kernel.
        wanted: bool on q's device, [] or [B, Hq, 1]: the kernels write only where it holds. None: everywhere.
        means: Mean keys [B, Hkv, columns, D] and values of all blocks, head dims padded, and int32 [B, Hq, R, words], a
            bit for each block that a row keeps: only the Hopper kernel reads them. None: pruned blocks are lost.
    """

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    indices: Tensor
    counts: Tensor
    out: Tensor
    lse: Tensor | None
    k_len: int
    block_table: Tensor | None = None
    packing: tuple[Tensor, ...] | None = None
    wanted: Tensor | None = None
    means: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def page_size(self) -> int:
        """Tokens a page; 0 where nothing is in pages."""
        return 0 if self.block_table is None else self.k.shape[2]

    @property
    def kept(self) -> Tensor:
        """The counts; 0 where the output is not wanted."""
        return self.counts if self.wanted is None else self.counts * self.wanted

    @property
    def logits(self) -> Logits:
        """How the kernels make logits."""
        return Logits.of(self.call, self.scale)

    def run(self, launch: AttentionLaunch, counts: Tensor) -> None:
        """Run a launch that was made for this layout, on q's device; `counts`: what is kept."""
        tensors = self.q, self.k, self.v, self.out, self.indices, counts
        places = {"lse": self.lse, "block_table": self.block_table, "packing": self.packing}
        run_on(self.q.device, launch.run, *tensors, **places, sinks=self.call.sinks, means=self.means)


class AttentionLaunch(NamedTuple):
    """The launch of one of the kernels for operands of one layout: of later ones it looks at the addresses only.

    Args:
        plan: The launch.
        boxes: By which the copy engine reads q, k and v, and the means, where there are any; or none of them.
        hopper: Whether it is the Hopper kernel.
    """

    plan: Launch
    boxes: Sequence[Boxes]
    hopper: bool

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        indices: Tensor,
        counts: Tensor,
        *,
        lse: Tensor | None = None,
        block_table: Tensor | None = None,
        packing: tuple[Tensor, ...] | None = None,
        sinks: Tensor | None = None,
        means: tuple[Tensor, Tensor, Tensor] | None = None,
        stream: int | None = None,
    ) -> None:
        """Run on the current device and stream; see `Operands`, and `Launch` for the stream."""
        inputs = self.describe(q, k, v, *(means[:2] if means else ()))
        rows = out, out if lse is None else lse, indices, counts
        last = counts if block_table is None else block_table, sinks_of(sinks, counts)
        if self.hopper:
            self.plan(*inputs[:3], *rows, *last, *((*inputs[3:], means[2]) if means else (None,) * 3), stream=stream)
        else:
            self.plan(*inputs, *rows, *(packing or (counts,) * 4), *last, stream=stream)

    def describe(self, *read: Tensor) -> Sequence[Any]:
        """Return q, k and v, and mean keys and values where there are any, as the kernel reads them."""
        return [box.of(x) for x, box in zip(read, self.boxes, strict=True)] if self.boxes else read


def portable_tile(q: Tensor, v: Tensor, block_size: int) -> Tile:
    """Pick the portable kernel's launch choices for q and v, [B, H, T, D]."""
    head_dim = max(padded(q.shape[3]), padded(v.shape[3]))
    tma = has_copy_engine(q.device)
    return choose_tile(block_size=block_size, head_dim=head_dim, item_bytes=q.element_size(), tma=tma)


def launch_portable(x: Operands) -> None:
    """Run the portable kernel on q's device, on its current stream."""
    counts = x.kept
    x.run(find_portable(x, counts), counts)


def find_portable(x: Operands, counts: Tensor) -> AttentionLaunch:
    """Find or make the portable kernel's launch; `counts` is `x.kept`."""
    q, k, v, lse = x.q, x.k, x.v, x.lse
    table = counts if x.block_table is None else x.block_table
    tile = portable_tile(q, v, x.call.block_size)
    tensors = (x.out, lse if lse is not None else x.out, x.indices, counts)
    # Smaller pages would take several copies a tile, which the portable kernel's descriptors cannot join.
    tma = has_copy_engine(q.device) and all(map(describable, (q, k, v))) and x.page_size % tile.keys == 0
    key = layouts_of(q, k, v, x.out, x.indices, counts, table), q.dtype, q.device, alignment_of(q, k, v, *tensors)
    flags = lse is not None, x.packing is not None, x.page_size, tma, x.wanted is not None
    return _portable_launch(*key, x.call.block_size, x.logits, x.call.window, *flags, tile)


@lru_cache(maxsize=1024)
def _portable_launch(
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
    alignment: tuple[bool, ...],
    block_size: int,
    logits: Logits,
    window: int | None,
    lse: bool,
    packed: bool,
    page_size: int,
    tma: bool,
    may_skip: bool,
    tile: Tile,
) -> AttentionLaunch:
    head_dim, v_head_dim = layouts[0][0][3], layouts[2][0][3]
    grid, numbers = geometry_of(layouts, layouts[0][0][2], layouts[1][0][2], logits, window)
    constants = {
        "D": head_dim,
        "DV": v_head_dim,
        "D_PAD": padded(head_dim),
        "DV_PAD": padded(v_head_dim),
        "BLOCK": block_size,
        "KEYS": tile.keys,
        "TMA": tma,
        "PACKED": packed,
        "PAGE": page_size,
        **switches_of(logits, dtype, device, window, lse),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "MAY_SKIP": may_skip,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None:  # not every target knows the option
        options["maxnreg"] = tile.registers
    strides = (*(layouts[i][1] for i in (0, 1, 2, 3)), *layouts[4][1][:3], *layouts[5][1])
    strides = (*strides, layouts[6][1][0] if page_size else 0)
    plan = Launch(attention_kernel, grid, (*strides, *numbers), constants, **options)
    shapes = [(block_size, padded(head_dim)), (tile.keys, padded(head_dim)), (tile.keys, padded(v_head_dim))]
    return AttentionLaunch(plan, [_boxes(TensorDescriptor, shape) for shape in shapes] if tma else (), hopper=False)


def launch_hopper(x: Operands) -> None:
    """Run the Hopper kernel, over one part, on q's device, on its current stream."""
    counts = x.kept
    x.run(find_hopper(x, counts), counts)


def find_hopper(x: Operands, counts: Tensor) -> AttentionLaunch:
    """Find or make the Hopper kernel's launch; `counts` is `x.kept`."""
    q, k, v, lse = x.q, x.k, x.v, x.lse
    tensors = (x.out, lse if lse is not None else x.out, x.indices, counts)
    key = layouts_of(q, k, v, x.out, x.indices, counts), q.dtype, q.device, alignment_of(*tensors)
    tile = choose_hopper_tile(x.call.block_size, padded(q.shape[3]), padded(v.shape[3]))
    sizes = x.k_len, x.page_size, x.call.block_size
    flags = x.call.window, lse is not None, *sizes, x.wanted is not None, x.means is not None
    return _hopper_launch(*key, x.logits, *flags, tile)


@lru_cache(maxsize=1024)
def _hopper_launch(
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
    alignment: tuple[bool, ...],
    logits: Logits,
    window: int | None,
    lse: bool,
    k_len: int,
    page_size: int,
    block_size: int,
    may_skip: bool,
    means: bool,
    tile: HopperTile,
) -> AttentionLaunch:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from stem_attn.backends.triton.hopper_kernel import box_layout, box_shape, hopper_attention_kernel

    pad, pad_v = padded(layouts[0][0][3]), padded(layouts[2][0][3])
    grid, numbers = geometry_of(layouts, layouts[0][0][2], k_len, logits, window)
    constants = {
        "DV": layouts[2][0][3],
        "DV_PAD": pad_v,
        "KEYS": tile.keys,
        "PAGE": page_size,
        "STAGES": tile.stages,
        **switches_of(logits, dtype, device, window, lse),
        "BLOCK": block_size,
        "MAY_SKIP": may_skip,
    }
    strides = (layouts[3][1], *layouts[4][1][:3], *layouts[5][1])
    # A multiprocessor's threads share 64 Ki registers; the kernel deals its own out anew.
    options = {"num_warps": 4, "maxnreg": tile.registers}
    plan = Launch(hopper_attention_kernel, grid, (*strides, *numbers), constants, **options)
    shapes = [(64, pad), *(box_shape(tile.keys, dim, page_size) for dim in (pad, pad_v))]
    if means:
        shapes += [(tile.keys, pad), (tile.keys, pad_v)]
    return AttentionLaunch(plan, [_boxes(GluonDescriptor, shape, box_layout(shape)) for shape in shapes], hopper=True)


def _boxes(kind: Any, shape: tuple[int, int], *layout: Any) -> Boxes:
    return Boxes(lambda x: kind(x, *described(x, *shape), *layout))


def geometry_of(
    layouts: Layouts, q_len: int, k_len: int, logits: Logits, window: int | None
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """Return the grid, and the numbers that all kernels take after the strides."""
    (batch, heads, _, _), kv_heads, rows = layouts[0][0], layouts[1][0][1], layouts[5][0][2]
    # Maxima are taken of what the last factor multiplies: a dot product, or a tanh.
    factors = (logits.factor, 0.0) if logits.softcap is None else (logits.cap, logits.factor)
    numbers = (rows, min(rows, LEAD_ROWS), heads // kv_heads, q_len, k_len, *factors, window or 0)
    return (rows * heads, batch, 1), numbers


def switches_of(
    logits: Logits, dtype: torch.dtype, device: torch.device, window: int | None, lse: bool
) -> dict[str, Any]:
    """Return the constants by which all kernels are compiled for what a call has."""
    return {
        "WINDOW": window is not None,
        "LSE": lse,
        "SINKS": logits.sinks is not None,
        "TANH": logits.tanh(dtype, device),
    }
