"""Attention over kept blocks by the compiled kernel (`kernel.cpp`)."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stem_attn.backends.cpu import build
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call

SWITCH = "STEM_ATTN_NATIVE"
"""Environment variable: with 0 the kernel is neither compiled nor used."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4))


class _Call(ctypes.Structure):
    """`Call` of kernel.cpp."""

    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "lse", "indices", "counts", "sinks")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "q_len", "k_len", "dim", "v_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "window", "threads")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


def takes(q: Tensor) -> bool:
    """Tell whether the kernel is written for a tensor's device and dtype."""
    return q.device.type == "cpu" and q.dtype in _DTYPES


def why_not() -> str | None:
    """Say why the kernel cannot be used here; compile it if that has not been done."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 forbids to compile the kernel"
    return _kernel()[1]


def attend_blocks(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    out: Tensor,
    lse: Tensor | None,
    threads: int,
) -> None:
    """Attend over the kept blocks; `why_not()` is None.

    Sums are in float32, whatever the dtype. Where the CPU multiplies pairs of bfloat16, the softmax's weights are
    rounded to it for their product with the values, as SDPA does. A query is computed by one thread, in an order that
    depends on nothing but its kept blocks: how many threads there are changes no bit.

    Args:
        call: What attention is asked for; its tensors are not read.
        q: [B, Hq, Tq, D], the last Tq of Tk tokens, float32, bfloat16 or float16; any strides, as for all others.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        selection: The kept blocks.
        out: [B, Hq, Tq, Dv] in q's dtype; written.
        lse: float32 [B, Hq, Tq], the natural log-sum-exp of the logits; written. None: not wanted.
        threads: At most so many: the calling one, and new ones that run where it may run and end with the call.

    Raises:
        MemoryError: There is none for what a thread needs (less than a mebibyte up to a head dim of 256).
    """
    kernel, reason = _kernel()
    assert kernel is not None, reason
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len, v_dim = v.shape[1:]
    sinks = None if call.sinks is None else call.sinks.float()
    tensors = (q, k, v, out, lse, selection.indices, selection.counts, sinks)  # held here while the kernel reads them
    arguments = _Call(
        *map(_describe, tensors),
        *(batch, heads, kv_heads, q_len, k_len, dim, v_dim),
        *(selection.block_size, 0 if call.window is None else min(call.window, k_len), threads),
        *(call.scale, 0.0 if call.softcap is None else call.softcap, _DTYPES[q.dtype]),
    )
    if kernel.stem_attend(ctypes.byref(arguments)):  # Python's lock is free meanwhile
        raise MemoryError("no memory for block-sparse attention")


def _describe(x: Tensor | None) -> _Tensor:
    return _Tensor() if x is None else _Tensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


@cache
def _kernel() -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = build.load(Path(__file__).with_name("kernel.cpp"))
    if library is not None:
        library.stem_attend.argtypes = [ctypes.POINTER(_Call)]
        library.stem_attend.restype = ctypes.c_int
    return library, reason
