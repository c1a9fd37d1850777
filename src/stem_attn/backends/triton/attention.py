"""Launch the attention kernels: which one, its strides, descriptors and grid."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.base import empty_output
from stem_attn.backends.triton.attention_kernel import attention_kernel
from stem_attn.backends.triton.launch import Launch, on_device
from stem_attn.backends.triton.launch_order import LEAD_ROWS
from stem_attn.backends.triton.tiles import HopperTile, Tile, choose_hopper_tile, choose_tile
from stem_attn.blocks import BlockSelection

log = logging.getLogger("stem_attn")

Layouts = tuple[tuple[torch.Size, tuple[int, ...]], ...]
"""Shapes and strides of q, k, v, out, indices, counts and, for the portable kernel, the block table."""

GLUON_TRITON = ((3, 6), (3, 9))
"""The oldest and the newest Triton that the Hopper kernel was compiled with; run with 3.6."""
LONG_TOKENS = 1024
"""Packed sequences of this many query tokens on average fill a Hopper GPU one at a time, with its own kernel."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, window: int | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend over the kept blocks; see `Backend.attend`."""
    out = empty_output(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    q, k, v, scale = normalise(q, k, v, scale)
    indices = _unit_stride(selection.indices)
    if hopper_fits(q, k, v, selection.block_size):
        launch_hopper(q, k, v, out, lse, indices, selection.counts, scale, window)
    else:
        portable = portable_tile(q, v, selection.block_size)
        launch(q, k, v, out, lse, indices, selection.counts, selection.block_size, scale, window, portable)
    return out, lse


def attend_packed(q: Tensor, k: Tensor, v: Tensor, selections: Sequence[BlockSelection], *, scale: float) -> Tensor:
    """Attend within each of several packed sequences; see `Backend.attend_packed`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = empty_output(q, v)
    attend_each(out, q, k, v, None, selections, scale)
    return out[0].transpose(0, 1)


def attend_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    selections: Sequence[BlockSelection],
    *,
    scale: float,
    out: Tensor,
) -> None:
    """Attend within each of several sequences that are kept in pages; see `Backend.attend_paged`."""
    q, out = (x.transpose(0, 1)[None] for x in (q, out))
    attend_each(out, q, k, v, block_table, selections, scale)


def attend_each(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    selections: Sequence[BlockSelection],
    scale: float,
    lse: Tensor | None = None,
) -> None:
    """Attend within each of several sequences, in one launch, or in one a sequence where they are long.

    Args:
        out: [1, Hq, T, Dv].
        q: [1, Hq, T, D].
        k: [1, Hkv, Tk, D], or [pages, Hkv, page_size, D] where `block_table` is given.
        v: [1, Hkv, Tk, Dv], likewise.
        block_table: int32 [sequences, pages of the longest], last stride 1; or None.
        selections: One a sequence.
        scale: Factor of the logits.
        lse: float32 [1, Hq, T] contiguous, of a single sequence, to write the log-sum-exp to; or None.
    """
    q, k, v, scale = normalise(q, k, v, scale)
    block_size = selections[0].block_size
    page_size = 0 if block_table is None else k.shape[2]
    if q.shape[2] >= LONG_TOKENS * len(selections) and hopper_fits(q, k, v, block_size, page_size):
        q_start = k_start = 0
        for n, selection in enumerate(selections):
            q_stop, k_stop = q_start + selection.q_len, k_start + selection.k_len
            keys, values, pages = k, v, None
            if block_table is None:
                keys, values = k[:, :, k_start:k_stop], v[:, :, k_start:k_stop]
            else:
                pages = block_table[n]
            queries, part = q[:, :, q_start:q_stop], out[:, :, q_start:q_stop]
            indices = _unit_stride(selection.indices)
            launch_hopper(
                queries, keys, values, part, lse, indices, selection.counts, scale, None, selection.k_len, pages
            )
            q_start, k_start = q_stop, k_stop
    else:
        indices, counts, packing = _pack(selections, q.device)
        tile = portable_tile(q, v, block_size)
        launch(q, k, v, out, lse, indices, counts, block_size, scale, None, tile, packing, block_table)


def _pack(selections: Sequence[BlockSelection], device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Put the sequences' rows one after the other, and say where each sequence starts.

    Returns:
        indices [1, Hq, R, S], counts [1, Hq, R], and int32 (row_sequence [R], first_rows, q_starts, k_starts).
    """
    width = max(s.indices.shape[-1] for s in selections)
    indices = torch.cat([torch.nn.functional.pad(s.indices, (0, width - s.indices.shape[-1])) for s in selections], 2)
    counts = torch.cat([s.counts for s in selections], 2)
    starts = [[0], [0], [0]]
    for s in selections:
        for start, length in zip(starts, (s.grid.q_blocks, s.q_len, s.k_len), strict=True):
            start.append(start[-1] + length)
    row_sequence = [n for n, s in enumerate(selections) for _ in range(s.grid.q_blocks)]
    table = torch.tensor([x for part in (row_sequence, *starts) for x in part], dtype=torch.int32)
    sizes = [len(row_sequence), *(len(start) for start in starts)]
    return indices, counts, table.to(device, non_blocking=True).split(sizes)


def normalise(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Copy what the kernels cannot address, and make the scale positive: they take maxima before they scale."""
    if scale <= 0:
        q, scale = q * scale, 1.0
    q, k, v = map(_unit_stride, (q, k, v))
    return q, k, v, scale


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def portable_tile(q: Tensor, v: Tensor, block_size: int) -> Tile:
    """Pick the portable kernel's launch choices for q and v, [B, H, T, D]."""
    head_dim = max(padded(q.shape[3]), padded(v.shape[3]))
    tma = has_copy_engine(q.device)
    return choose_tile(block_size=block_size, head_dim=head_dim, item_bytes=q.element_size(), tma=tma)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    tile: Tile,
    packing: tuple[Tensor, ...] | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Run the portable kernel on q's device, on its current stream."""
    page_size = 0 if block_table is None else k.shape[2]
    table = counts if block_table is None else block_table
    tensors = (out, lse if lse is not None else out, indices, counts, *(packing or (counts,) * 4))
    # Smaller pages would take several copies a tile, which the portable kernel's descriptors cannot join.
    tma = has_copy_engine(q.device) and all(map(_describable, (q, k, v))) and page_size % tile.keys == 0
    key = _layouts(q, k, v, out, indices, counts, table), q.dtype, q.device, _alignment(q, k, v, *tensors)
    plan = _portable_plan(*key, block_size, scale, window, lse is not None, packing is not None, page_size, tma, tile)
    inputs: tuple[Any, ...] = (q, k, v)
    if tma:
        pad, pad_v = padded(q.shape[3]), padded(v.shape[3])
        shapes = ((block_size, pad), (tile.keys, pad), (tile.keys, pad_v))
        inputs = tuple(TensorDescriptor(x, *_described(x, *shape)) for x, shape in zip(inputs, shapes, strict=True))
    _run(plan, q.device, *inputs, *tensors, table)


@lru_cache(maxsize=1024)
def _portable_plan(
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
    alignment: tuple[bool, ...],
    block_size: int,
    scale: float,
    window: int | None,
    lse: bool,
    packed: bool,
    page_size: int,
    tma: bool,
    tile: Tile,
) -> Launch:
    """Make the launch that calls of equal layouts share."""
    head_dim, v_head_dim = layouts[0][0][3], layouts[2][0][3]
    grid, numbers = _geometry(layouts, layouts[1][0][2], scale, window)
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
        "WINDOW": window is not None,
        "LSE": lse,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None:  # not every target knows the option
        options["maxnreg"] = tile.registers
    strides = (*(layouts[i][1] for i in (0, 1, 2, 3, 4, 5)), layouts[6][1][0] if page_size else 0)
    return Launch(attention_kernel, grid, (*strides, *numbers), constants, **options)


def hopper_fits(q: Tensor, k: Tensor, v: Tensor, block_size: int, page_size: int = 0) -> bool:
    """Tell whether the Hopper kernel can take a call; `page_size` is 0 where k and v are not paged."""
    if q.device.type != "cuda" or torch.version.hip is not None or _capability(q.device) != (9, 0):
        return False
    pads = padded(q.shape[3]), padded(v.shape[3])
    shaped = block_size == 128 and min(pads) >= 64 and q.element_size() == 2
    if not shaped or not all(map(_describable, (q, k, v))):
        return False
    keys = choose_hopper_tile(*pads).keys
    return (page_size % keys == 0 or (keys % page_size == 0 and page_size >= 8)) and _gluon_known()


@cache
def _gluon_known() -> bool:
    """Tell whether this Triton can compile the Hopper kernel: Gluon is experimental, and its names change."""
    known = GLUON_TRITON[0] <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= GLUON_TRITON[1]
    if not known:
        log.warning("Triton %s is not known to compile the Hopper kernel: the portable one runs", triton.__version__)
    return known


def launch_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    window: int | None,
    k_len: int | None = None,
    pages: Tensor | None = None,
) -> None:
    """Run the Hopper kernel on q's device, on its current stream.

    With `pages`, int32 and contiguous, k and v are [pages, Hkv, page_size, D] and hold `k_len` tokens of one sequence.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    page_size = 0 if pages is None else k.shape[2]
    tensors = (out, lse if lse is not None else out, indices, counts)
    key = _layouts(q, k, v, out, indices, counts), q.dtype, q.device, _alignment(*tensors)
    tile = choose_hopper_tile(padded(q.shape[3]), padded(v.shape[3]))
    k_len = k.shape[2] if k_len is None else k_len
    plan, boxes = _hopper_plan(*key, scale, window, lse is not None, k_len, page_size, tile)
    inputs = (
        GluonDescriptor(x, *_described(x, *shape), layout) for x, (shape, layout) in zip((q, k, v), boxes, strict=True)
    )
    _run(plan, q.device, *inputs, *tensors, counts if pages is None else pages)


@lru_cache(maxsize=1024)
def _hopper_plan(
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
    alignment: tuple[bool, ...],
    scale: float,
    window: int | None,
    lse: bool,
    k_len: int,
    page_size: int,
    tile: HopperTile,
) -> tuple[Launch, list[tuple[tuple[int, int], Any]]]:
    """Make the launch that calls of equal layouts share, and the tile and its layout of each input's descriptor."""
    from stem_attn.backends.triton.hopper_kernel import box_layout, box_shape, hopper_attention_kernel

    pad, pad_v = padded(layouts[0][0][3]), padded(layouts[2][0][3])
    grid, numbers = _geometry(layouts, k_len, scale, window)
    constants = {
        "DV": layouts[2][0][3],
        "DV_PAD": pad_v,
        "KEYS": tile.keys,
        "PAGE": page_size,
        "STAGES": tile.stages,
        "WINDOW": window is not None,
        "LSE": lse,
    }
    strides = tuple(layouts[i][1] for i in (3, 4, 5))
    # 384 threads share 64 Ki registers; the kernel deals them out anew.
    plan = Launch(hopper_attention_kernel, grid, (*strides, *numbers), constants, num_warps=4, maxnreg=168)
    boxes = ((64, pad), *(box_shape(tile.keys, dim, page_size) for dim in (pad, pad_v)))
    return plan, [(box, box_layout(box)) for box in boxes]


def _geometry(
    layouts: Layouts, k_len: int, scale: float, window: int | None
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """Return the grid, and the numbers that both kernels take after the strides."""
    (batch, heads, q_len, _), kv_heads, rows = layouts[0][0], layouts[1][0][1], layouts[5][0][2]
    numbers = (rows, min(rows, LEAD_ROWS), heads // kv_heads, q_len, k_len, scale * math.log2(math.e), window or 0)
    return (rows * heads, batch, 1), numbers


def _layouts(*tensors: Tensor) -> Layouts:
    return tuple((x.shape, x.stride()) for x in tensors)


def _alignment(*tensors: Tensor) -> tuple[bool, ...]:
    """Say which tensors start at a multiple of 16 bytes: kernels are compiled for it."""
    return tuple(x.data_ptr() % 16 == 0 for x in tensors)


def has_copy_engine(device: torch.device) -> bool:
    """Tell whether tiles should be copied by descriptor: on NVIDIA's data-centre GPUs since Hopper.

    Consumer Blackwell has the engine too, but there Triton 3.6 spills thousands of bytes a thread with it.
    """
    return device.type == "cuda" and torch.version.hip is None and _capability(device)[0] in (9, 10)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _describable(x: Tensor) -> bool:
    """Tell whether the copy engine can address a tensor: 16-byte aligned base and strides."""
    steps = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)


def _described(x: Tensor, tokens: int, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Return shape, strides and tile of a descriptor for [1, 1, tokens, dims]; outside the tensor it reads zeros."""
    aligned = 16 // x.element_size()
    strides = [s if n > 1 else aligned for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return list(x.shape), [*strides, 1], [1, 1, tokens, dims]


def padded(head_dim: int) -> int:
    """Round a head dim up to a power of two that a matrix product can take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _run(plan: Launch, device: torch.device, *tensors: Any) -> None:
    """Launch, and log a call that had to compile, or to read Triton's cache."""
    start_s = time.perf_counter()
    with on_device(device):
        plan(*tensors)
    seconds = time.perf_counter() - start_s
    if seconds > 0.1:
        log.info("attention: the first call of a kernel took %.1f s", seconds)
