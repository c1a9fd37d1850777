"""Launch the attention kernels: which one, its strides, descriptors and grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.attention_kernel import attention_kernel
from stem_attn.backends.triton.boxes import Boxes
from stem_attn.backends.triton.host_numbers import to_device
from stem_attn.backends.triton.launch import Launch, capability_of, on_device
from stem_attn.backends.triton.launch_order import LEAD_ROWS
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.tiles import HopperTile, Tile, choose_hopper_tile, choose_tile
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Part

log = logging.getLogger("stem_attn")

Layouts = tuple[tuple[torch.Size, tuple[int, ...]], ...]
"""Shapes and strides of q, k, v, out, indices, counts and, for the portable kernel, the block table."""

GLUON_TRITON = ((3, 6), (3, 9))
"""The oldest and the newest Triton that the Hopper kernel was compiled with; run with 3.6."""
FEW_PARTS = 2
LONG_ROWS = 96
"""So few sequences, or sequences of so many rows (of all heads, on average), go one at a time on the Hopper kernel.

Others go in one launch of the portable kernel. Measured on an H200 (docs/log.md): two short ones are 1.15 to 1.7 times
as fast one at a time; of four and more those with 128 rows 1.4 to 1.6 times, with 64 .9, with 12 .24 to .5.
"""


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


def attend(
    call: Call,
    selections: Sequence[BlockSelection],
    out: Tensor,
    lse: Tensor | None,
    wanted: Tensor | None = None,
) -> None:
    """Attend over the kept blocks; see `Backend.attend`.

    Several sequences go in one launch of the portable kernel, or in one launch each; see `goes_in_one`.

    Args:
        call: The call.
        selections: The kept blocks of every part.
        out: [B, Hq, T, Dv].
        lse: float32 [B, Hq, T], or None.
        wanted: bool [] on the call's device: nothing is written unless it holds. None: it does.
    """
    parts = call.parts
    if len(parts) > 1:
        q, k, v, scale = addressable(call, call.q, call.k, call.v)
        if goes_in_one(call, hopper_fits(q, k, v, call.block_size, call.layout.page_size)):
            assert lse is None  # of packed and paged calls nobody can ask for it
            indices, counts, packing = _pack(call, selections, parts)
            where = 0, call.layout.block_table, packing
            operands = Operands(call, q, k, v, scale, indices, counts, out, None, *where, wanted)
            launch(operands, portable_tile(q, v, call.block_size))
            return
        for part, selection in zip(parts, selections, strict=True):
            attend_part(call, part, selection, out[:, :, part.tokens], None, wanted)
        return
    attend_part(call, parts[0], selections[0], out, lse, wanted)


def goes_in_one(call: Call, fits: bool) -> bool:
    """Tell whether several sequences go in one launch of the portable kernel; `fits`: the Hopper kernel takes them."""
    count = len(call.parts)
    if count == 1 or not fits:
        return count > 1
    rows = sum(call.grid(part).q_blocks for part in call.parts) * call.q.shape[1]
    return count > FEW_PARTS and rows < LONG_ROWS * count


def attend_part(
    call: Call, part: Part, selection: BlockSelection, out: Tensor, lse: Tensor | None, wanted: Tensor | None = None
) -> None:
    """Attend within one part; out [B, Hq, Tq, Dv] and lse, float32 [B, Hq, Tq] contiguous, are the part's own."""
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    if hopper_fits(q, k, v, call.block_size, call.layout.page_size):
        rows = rows_of(selection), selection.counts
        launch_hopper(Operands(call, q, k, v, scale, *rows, out, lse, part.k_len, part.pages, None, wanted))
        return
    table = packing = None
    if part.pages is None:
        indices, counts = rows_of(selection), selection.counts
    else:  # what reads pages reads packed sequences, be it one
        table = part.pages[None]
        indices, counts, packing = _pack(call, [selection], [part])
    operands = Operands(call, q, k, v, scale, indices, counts, out, lse, part.k_len, table, packing, wanted)
    launch(operands, portable_tile(q, v, call.block_size))


def addressable(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Copy what the kernels cannot address, and make the scale positive; return q, k, v and the scale."""
    scale = call.scale
    if scale <= 0:
        q, scale = q * scale, 1.0
    q, k, v = map(unit_stride, (q, k, v))
    return q, k, v, scale


def rows_of(selection: BlockSelection) -> Tensor:
    """Return a selection's indices, last stride 1; what keeps everything has one row for all."""
    if not selection.keeps_everything:
        return unit_stride(selection.indices)
    blocks = torch.arange(selection.grid.k_blocks, dtype=torch.int32, device=selection.counts.device)
    return blocks.expand(*selection.counts.shape, -1)


def _pack(
    call: Call, selections: Sequence[BlockSelection], parts: Sequence[Part]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Put the sequences' rows one after the other; return indices [1, Hq, R, S], counts [1, Hq, R] and `packing_of`."""
    width = max(s.indices.shape[-1] for s in selections)
    indices = torch.cat([torch.nn.functional.pad(s.indices, (0, width - s.indices.shape[-1])) for s in selections], 2)
    counts = torch.cat([s.counts for s in selections], 2)
    return indices, counts, packing_of(call, parts)


def packing_of(call: Call, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Say where each of several sequences starts: int32 row_sequence [R], first_rows, q_starts, k_starts."""
    starts: list[list[int]] = [[0], [0], [0]]
    row_sequence: list[int] = []
    for n, part in enumerate(parts):
        rows = call.grid(part).q_blocks
        row_sequence += [n] * rows
        for start, length in zip(starts, (rows, part.q_len, part.k_len), strict=True):
            start.append(start[-1] + length)
    table = torch.tensor([x for part in (row_sequence, *starts) for x in part], dtype=torch.int32, device="cpu")
    sizes = [len(row_sequence), *(len(start) for start in starts)]
    packing: tuple[Tensor, ...] = to_device(table, call.q.device).split(sizes)
    return packing


def unit_stride(x: Tensor) -> Tensor:
    """Return a tensor, or a copy, whose last stride is 1."""
    return x if x.stride(3) == 1 else x.contiguous()


def portable_tile(q: Tensor, v: Tensor, block_size: int) -> Tile:
    """Pick the portable kernel's launch choices for q and v, [B, H, T, D]."""
    head_dim = max(padded(q.shape[3]), padded(v.shape[3]))
    tma = has_copy_engine(q.device)
    return choose_tile(block_size=block_size, head_dim=head_dim, item_bytes=q.element_size(), tma=tma)


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


def launch(x: Operands, tile: Tile) -> None:
    """Run the portable kernel on q's device, on its current stream."""
    counts = x.kept
    x.run(find_portable(x, counts, tile), counts)


def find_portable(x: Operands, counts: Tensor, tile: Tile) -> AttentionLaunch:
    """Find or make the portable kernel's launch; `counts` is `x.kept`."""
    q, k, v, lse = x.q, x.k, x.v, x.lse
    table = counts if x.block_table is None else x.block_table
    tensors = (x.out, lse if lse is not None else x.out, x.indices, counts)
    # Smaller pages would take several copies a tile, which the portable kernel's descriptors cannot join.
    tma = has_copy_engine(q.device) and all(map(_describable, (q, k, v))) and x.page_size % tile.keys == 0
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


def hopper_fits(q: Tensor, k: Tensor, v: Tensor, block_size: int, page_size: int) -> bool:
    """Tell whether the Hopper kernel can take these operands; `page_size` is 0 where k and v are not in pages."""
    pads = padded(q.shape[3]), padded(v.shape[3])
    # At head dim 64 blocks of 64 have not been measured; above 128 two programs would not share a multiprocessor.
    sized = (block_size == 128 and min(pads) >= 64) or (block_size == 64 and pads == (128, 128))
    if not sized or q.element_size() != 2 or not all(map(_describable, (q, k, v))):
        return False
    keys = choose_hopper_tile(block_size, *pads).keys
    return (page_size % keys == 0 or (keys % page_size == 0 and page_size >= 8)) and gluon_runs_on(q.device)


def gluon_runs_on(device: torch.device) -> bool:
    """Tell whether the Hopper kernels run on a device."""
    if device.type != "cuda" or torch.version.hip is not None or capability_of(device) != (9, 0):
        return False
    return _gluon_known()


@cache
def _gluon_known() -> bool:
    """Tell whether this Triton can compile the Hopper kernel: Gluon is experimental, and its names change."""
    known = GLUON_TRITON[0] <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= GLUON_TRITON[1]
    if not known:
        log.warning("Triton %s is not known to compile the Hopper kernel: the portable one runs", triton.__version__)
    return known


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
    return Boxes(lambda x: kind(x, *_described(x, *shape), *layout))


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


def layouts_of(*tensors: Tensor) -> Layouts:
    """Return shapes and strides."""
    return tuple((x.shape, x.stride()) for x in tensors)


def alignment_of(*tensors: Tensor) -> tuple[bool, ...]:
    """Say which tensors start at a multiple of 16 bytes: kernels are compiled for it."""
    return tuple(x.data_ptr() % 16 == 0 for x in tensors)


def has_copy_engine(device: torch.device) -> bool:
    """Tell whether tiles should be copied by descriptor: on NVIDIA's data-centre GPUs since Hopper.

    Consumer Blackwell has the engine too, but there Triton 3.6 spills thousands of bytes a thread with it.
    """
    return device.type == "cuda" and torch.version.hip is None and capability_of(device)[0] in (9, 10)


def _describable(x: Tensor) -> bool:
    """Tell whether the copy engine can address a tensor: 16-byte aligned base and strides."""
    aligned = 16 // x.element_size()
    strides, shape = x.stride(), x.shape
    return x.data_ptr() % 16 == 0 and all(
        shape[i] == 1 or (strides[i] > 0 and strides[i] % aligned == 0) for i in range(3)
    )


def _described(x: Tensor, tokens: int, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Return shape, strides and tile of a descriptor for [1, 1, tokens, dims]; outside the tensor it reads zeros."""
    aligned = 16 // x.element_size()
    strides = [s if n > 1 else aligned for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return list(x.shape), [*strides, 1], [1, 1, tokens, dims]


def padded(head_dim: int) -> int:
    """Round a head dim up to a power of two that a matrix product can take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def run_on(device: torch.device, run: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """Launch on a device, and log a call that had to compile, or to read Triton's cache."""
    start_s = time.perf_counter()
    with on_device(device):
        run(*arguments, **named)
    seconds = time.perf_counter() - start_s
    if seconds > 0.1:
        log.info("attention: the first call of a kernel took %.1f s", seconds)
