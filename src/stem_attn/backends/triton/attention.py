"""Launch the attention kernels: which one, its strides, descriptors and grid."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.base import empty_output
from stem_attn.backends.triton.attention_kernel import attention_kernel
from stem_attn.backends.triton.tiles import HopperTile, Tile, choose_hopper_tile, choose_tile
from stem_attn.blocks import BlockSelection

log = logging.getLogger("stem_attn")
_compiled: set[tuple[Any, ...]] = set()

LONG_TOKENS = 1024
"""Packed sequences of this many query tokens on average fill a Hopper GPU one at a time, with its own kernel."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, window: int | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend over the kept blocks; see `Backend.attend`."""
    out = empty_output(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    _attend_into(out, lse, q, k, v, selection, scale, window)
    return out, lse


def _attend_into(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float,
    window: int | None,
) -> None:
    q, k, v, scale = _normalise(q, k, v, scale)
    indices = selection.indices if selection.indices.stride(3) == 1 else selection.indices.contiguous()
    if hopper_fits(q, k, v, selection.block_size):
        tile = choose_hopper_tile(_padded(q.shape[3]), _padded(v.shape[3]))
        launch_hopper(q, k, v, out, lse, indices, selection.counts, scale, window, tile)
    else:
        portable = _portable_tile(q, v, selection.block_size)
        launch(q, k, v, out, lse, indices, selection.counts, selection.block_size, scale, window, portable)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selections: Sequence[BlockSelection],
    *,
    scale: float,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend within each of several sequences packed one after the other: in one launch, or one a long sequence.

    Args:
        q: [T, Hq, D], the query tokens of all sequences.
        k: [Tk, Hkv, D], the key tokens of all sequences.
        v: [Tk, Hkv, Dv].
        selections: One a sequence, each of batch 1; their lengths say where a sequence starts.
        scale: Factor of the logits.
        window: Tokens of a causal sliding window, or None.
        return_lse: Whether the log-sum-exp is wanted.

    Returns:
        out [T, Hq, Dv] and the natural log-sum-exp float32 [Hq, T] or None.
    """
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(1, q.shape[1], q.shape[0], dtype=torch.float32) if return_lse else None
    q, k, v, heads_first = (x.transpose(0, 1)[None] for x in (q, k, v, out))
    block_size = selections[0].block_size
    if q.shape[2] >= LONG_TOKENS * len(selections) and hopper_fits(q, k, v, block_size):
        q_start = k_start = 0
        for selection in selections:
            q_stop, k_stop = q_start + selection.q_len, k_start + selection.k_len
            queries, keys = slice(q_start, q_stop), slice(k_start, k_stop)
            part = None if lse is None else lse.new_empty(1, q.shape[1], selection.q_len)
            views = heads_first[:, :, queries], part, q[:, :, queries], k[:, :, keys], v[:, :, keys]
            _attend_into(*views, selection, scale, window)
            if lse is not None and part is not None:
                lse[:, :, queries] = part
            q_start, k_start = q_stop, k_stop
    else:
        q, k, v, scale = _normalise(q, k, v, scale)
        indices, counts, packing = _pack(selections, q.device)
        tile = _portable_tile(q, v, block_size)
        launch(q, k, v, heads_first, lse, indices, counts, block_size, scale, window, tile, packing)
    return out, None if lse is None else lse[0]


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


def _normalise(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Copy what the kernels cannot address, and make the scale positive: they take maxima before they scale."""
    if scale <= 0:
        q, scale = q * scale, 1.0
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v, scale


def _portable_tile(q: Tensor, v: Tensor, block_size: int) -> Tile:
    head_dim = max(_padded(q.shape[3]), _padded(v.shape[3]))
    hopper = has_copy_engine(q.device)
    return choose_tile(block_size=block_size, head_dim=head_dim, item_bytes=q.element_size(), hopper=hopper)


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
) -> None:
    """Run the portable kernel on q's device, on its current stream."""
    _, heads, q_len, head_dim = q.shape
    pad, pad_v = _padded(head_dim), _padded(v.shape[3])
    tma = has_copy_engine(q.device) and all(map(_describable, (q, k, v)))
    tensors: tuple[Any, ...] = (q, k, v)
    if tma:
        shapes = ((block_size, pad), (tile.keys, pad), (tile.keys, pad_v))
        tensors = tuple(TensorDescriptor(x, *_described(x, *shape)) for x, shape in zip(tensors, shapes, strict=True))
    rows = counts.shape[2]
    grid = (rows, heads, q.shape[0])
    with _first_call(q, v, block_size, tma, window is None, lse is None, packing is None, tile):
        attention_kernel[grid](
            *tensors,
            out,
            lse if lse is not None else out,
            indices,
            counts,
            *(packing if packing is not None else (counts,) * 4),
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            indices.stride(),
            counts.stride(),
            rows,
            heads // k.shape[1],
            q_len,
            k.shape[2],
            scale * math.log2(math.e),
            window or 0,
            D=head_dim,
            DV=v.shape[3],
            D_PAD=pad,
            DV_PAD=pad_v,
            BLOCK=block_size,
            KEYS=tile.keys,
            TMA=tma,
            PACKED=packing is not None,
            WINDOW=window is not None,
            LSE=lse is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )


def hopper_fits(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> bool:
    """Tell whether the Hopper kernel can take a call."""
    if not has_copy_engine(q.device) or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    pads = _padded(q.shape[3]), _padded(v.shape[3])
    shaped = block_size == 128 and min(pads) >= 64 and q.element_size() == 2
    return shaped and all(map(_describable, (q, k, v)))


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
    tile: HopperTile,
) -> None:
    """Run the Hopper kernel on q's device, on its current stream."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from stem_attn.backends.triton.hopper_kernel import hopper_attention_kernel, tile_layout

    _, heads, q_len, head_dim = q.shape
    pads = _padded(head_dim), _padded(head_dim), _padded(v.shape[3])
    shapes = [_described(x, n, d) for x, n, d in zip((q, k, v), (64, tile.keys, tile.keys), pads, strict=True)]
    descriptors = (
        GluonDescriptor(x, *shape, tile_layout(shape[2])) for x, shape in zip((q, k, v), shapes, strict=True)
    )
    rows = counts.shape[2]
    with _first_call(q, v, window is None, lse is None, tile):
        hopper_attention_kernel[(rows, heads, q.shape[0])](
            *descriptors,
            out,
            lse if lse is not None else out,
            indices,
            counts,
            out.stride(),
            indices.stride(),
            counts.stride(),
            rows,
            heads // k.shape[1],
            q_len,
            k.shape[2],
            scale * math.log2(math.e),
            window or 0,
            DV=v.shape[3],
            STAGES=tile.stages,
            WINDOW=window is not None,
            LSE=lse is not None,
            num_warps=4,
            maxnreg=168,  # 384 threads share 64 Ki registers; the kernel deals them out anew
        )


def has_copy_engine(device: torch.device) -> bool:
    """Tell whether the device copies tiles by descriptor: NVIDIA since Hopper."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _describable(x: Tensor) -> bool:
    """Tell whether the copy engine can address a tensor: 16-byte aligned base and strides."""
    steps = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)


def _described(x: Tensor, tokens: int, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Return shape, strides and tile of a descriptor for [1, 1, tokens, dims]; outside the tensor it reads zeros."""
    aligned = 16 // x.element_size()
    strides = [s if n > 1 else aligned for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return list(x.shape), [*strides, 1], [1, 1, tokens, dims]


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@contextmanager
def _first_call(q: Tensor, v: Tensor, *variant: Any) -> Iterator[None]:
    """Launch on q's device, and log what the first call of a variant cost: it compiles, or reads Triton's cache."""
    start_s = time.perf_counter()
    with torch.cuda.device(q.device if q.is_cuda else -1):
        yield
    key = (q.device, q.dtype, q.shape[3], v.shape[3], *variant)
    if key not in _compiled:
        _compiled.add(key)
        log.info("attention kernel for %s: first call took %.1f s", key, time.perf_counter() - start_s)
