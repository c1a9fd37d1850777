"""Attention with 8-bit products on Hopper: round q, k and v, then launch the kernel for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stem_attn.backends.triton.attention import (
    Layouts,
    _alignment,
    _capability,
    _geometry,
    _gluon_known,
    _layouts,
    _rows,
    _run,
    addressable,
    padded,
)
from stem_attn.backends.triton.launch import Launch, on_device
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.quantize_kernels import combine_kernel, measure_kernel, quantize_kernel
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Part

BLOCK = 128
CHUNKS = 64
"""Runs of a head's keys that are measured apart: with 8 KV heads four programs a multiprocessor of the largest GPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Queries, keys and values in e4m3, in whole blocks of 128 tokens; see `quantize_kernels`.

    Args:
        q: [B, Hq, Qb * 128, D], D padded to a power of two, as below.
        k: [B, Hkv, Kb * 128, D], less its mean.
        v: [B, Hkv, Kb * Dv, 128], blocks transposed, keys in an order of their own.
        q_scales: float32 [B, Hq, Qb].
        kv_scales: float32 [2, B, Hkv].
        shifts: float32 [B, Hq, Qb * 128], the dot products of q with the mean of k; None: not wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scales: Tensor
    kv_scales: Tensor
    shifts: Tensor | None


def quantize(q: Tensor, k: Tensor, v: Tensor, k_len: int, pages: Tensor | None, *, shifts: bool) -> Rounded:
    """Round to e4m3.

    Args:
        q: [B, Hq, Tq, D], last stride 1.
        k: [B, Hkv, Tk, D] or [pages, Hkv, page_size, D], last stride 1.
        v: [B, Hkv, Tk, Dv], likewise.
        k_len: Tk.
        pages: int32, the sequence's pages, last stride 1; None where nothing is in pages.
        shifts: Whether the dot products with the mean key are wanted.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, v_head_dim = k.shape[1], v.shape[3]
    offset = k_len - q_len
    q_blocks, k_blocks = -(-k_len // BLOCK) - offset // BLOCK, -(-k_len // BLOCK)
    pad, pad_v = padded(head_dim), padded(v_head_dim)
    dims = max(pad, pad_v)
    new = {"device": q.device, "dtype": torch.float32}
    measured = torch.empty((batch * kv_heads, CHUNKS, 4, dims), **new)
    means = torch.empty((batch * kv_heads, dims), **new)
    kv_scales = torch.empty((2, batch, kv_heads), **new)
    q_scales = torch.empty((batch, heads, q_blocks), **new)
    shift = torch.empty((batch, heads, q_blocks * BLOCK), **new) if shifts else None
    new["dtype"] = torch.float8_e4m3fn
    q8 = torch.empty((batch, heads, q_blocks * BLOCK, pad), **new)
    k8 = torch.empty((batch, kv_heads, k_blocks * BLOCK, pad), **new)
    v8 = torch.empty((batch, kv_heads, k_blocks * pad_v, BLOCK), **new)
    page_size = 0 if pages is None else k.shape[2]
    table = q_scales if pages is None else pages
    strides = [x.stride()[:3] for x in (q, k, v)]
    tokens = 32
    chunk = -(-k_len // (CHUNKS * tokens)) * tokens
    with on_device(q.device):
        measure_kernel[CHUNKS, batch * kv_heads](
            k, v, measured, table, *strides[1:], kv_heads, k_len, chunk,
            head_dim, v_head_dim, dims, tokens, page_size, num_warps=4,
        )  # fmt: skip
        combine_kernel[batch * kv_heads,](measured, means, kv_scales, k_len, CHUNKS, dims, num_warps=4)
        quantize_kernel[batch * heads * q_blocks + 2 * batch * kv_heads * k_blocks,](
            q, k, v, means, kv_scales, q8, k8, v8, q_scales, q_scales if shift is None else shift, table, *strides,
            batch * heads, batch * kv_heads, heads // kv_heads, kv_heads, offset % BLOCK, q_len, k_len, q_blocks,
            k_blocks, head_dim, v_head_dim, pad, pad_v, dims, BLOCK, shifts, page_size, num_warps=8,
        )  # fmt: skip
    return Rounded(q8, k8, v8, q_scales, kv_scales, shift)


def attend_part(call: Call, part: Part, selection: BlockSelection, out: Tensor, lse: Tensor | None) -> None:
    """Attend within one part with 8-bit products; the arguments are those of `attention.attend_part`."""
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    logits = Logits.of(call, scale)
    shifts = lse is not None or call.sinks is not None or call.softcap is not None
    x = quantize(q, k, v, part.k_len, part.pages, shifts=shifts)
    launch(x, call, logits, _rows(selection), selection.counts, out, lse, part.q_len, part.k_len)


def launch(
    x: Rounded, call: Call, logits: Logits, indices: Tensor, counts: Tensor,
    out: Tensor, lse: Tensor | None, q_len: int, k_len: int, variant: Any = None,
) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from stem_attn.backends.triton.hopper_fp8_kernel import box_layout

    tensors = (out, out if lse is None else lse, indices, counts)
    key = _layouts(x.q, x.k, x.v, out, indices, counts), x.q.device, _alignment(*tensors), out.dtype
    plan = _launch(*key, logits, call.window, lse is not None, q_len, k_len, variant)
    pad_v = x.v.shape[2] * BLOCK // x.k.shape[2]
    boxes = (64, x.q.shape[3]), (BLOCK, x.k.shape[3]), (pad_v, BLOCK)
    inputs = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, *box], box_layout(*box))
        for t, box in zip((x.q, x.k, x.v), boxes, strict=True)
    )
    shifts = x.q_scales if x.shifts is None else x.shifts
    _run(plan, x.q.device, *inputs, x.q_scales, x.kv_scales, shifts, *tensors, sinks_of(call, counts))


@lru_cache(maxsize=1024)
def _launch(
    layouts: Layouts, device: torch.device, alignment: tuple[bool, ...], dtype: torch.dtype, logits: Logits,
    window: int | None, lse: bool, q_len: int, k_len: int, variant: Any,
) -> Launch:
    from stem_attn.backends.triton.hopper_fp8_kernel import hopper_fp8_kernel

    rows = layouts[5][0][2]
    grid, numbers = _geometry(layouts, k_len, logits, window)
    numbers = (*numbers[:3], q_len, *numbers[4:])
    v_head_dim = layouts[3][0][3]
    constants = {
        "DV": v_head_dim,
        "STAGES": 2,
        "WINDOW": window is not None,
        "LSE": lse,
        "SINKS": logits.sinks is not None,
        "TANH": logits.tanh(dtype, device),
        "VARIANT": 0,
    } | (variant or {})
    strides = (layouts[3][1], *layouts[4][1][:3], *layouts[5][1])
    return Launch(hopper_fp8_kernel, grid, (*strides, *numbers), constants, num_warps=4, maxnreg=168)
