"""Checks of a call's inputs: each raises ValueError saying what was expected and what came, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from stem_attn.blocks import BlockSelection
from stem_attn.config import Residual, StemConfig


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check ranks, shapes, dtypes and devices, and that no gradient is asked for."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(f"{name} must be a tensor [batch, heads, tokens, head_dim], got {_shape(x)}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"q, k and v must not be empty, got {_shape(q)}, {_shape(k)}, {_shape(v)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and tokens, got {_shape(k)} and {_shape(v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head_dim, got {_shape(q)} and {_shape(k)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[1]} and {k.shape[1]}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must not have more tokens than k, got {q.shape[2]} and {k.shape[2]}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse prefill has no backward: call it under torch.no_grad() or with detached inputs")


def check_config(config: StemConfig) -> None:
    """Check that a config was passed, not a dict or a preset's name."""
    if not isinstance(config, StemConfig):
        raise ValueError(f"config must be a StemConfig, got {type(config).__name__}")


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the logits: the given one, or `1 / sqrt(head_dim)`."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)


def resolve_prompt_len(prompt_len: Any, batch: int, k_len: int) -> list[int]:
    """Return the prompt's length of every batch row, from an int, a sequence of ints, a tensor or None."""
    if prompt_len is None:
        return [k_len] * batch
    if isinstance(prompt_len, Tensor):
        prompt_len = prompt_len.tolist()
    lengths = list(prompt_len) if isinstance(prompt_len, Sequence) else [prompt_len] * batch
    whole = all(isinstance(n, int | torch.SymInt) and not isinstance(n, bool) for n in lengths)
    if len(lengths) != batch or not whole or any(n < k_len for n in lengths):
        raise ValueError(f"prompt_len must be an int or {batch} ints of at least k's {k_len} tokens, got {prompt_len}")
    return lengths


def resolve_starts(name: str, value: Tensor | Sequence[int], tokens: int) -> list[int]:
    """Return where packed sequences start and end: rising ints from 0 to `tokens`."""
    starts = value.tolist() if isinstance(value, Tensor) else list(value)
    rising = len(starts) > 1 and all(a < b for a, b in pairwise(starts))
    if not rising or starts[0] != 0 or starts[-1] != tokens or any(type(s) is not int for s in starts):
        raise ValueError(f"{name} must be rising ints from 0 to {tokens} tokens, got {starts}")
    return starts


def check_selection(selection: BlockSelection, q: Tensor, k: Tensor) -> None:
    """Check that a selection was made for inputs of these shapes, on this device."""
    if not isinstance(selection, BlockSelection):
        raise ValueError(f"selection must be a BlockSelection, got {type(selection).__name__}")
    if (selection.q_len, selection.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"selection is for q_len={selection.q_len}, k_len={selection.k_len}; "
            f"q and k have {q.shape[2]} and {k.shape[2]} tokens"
        )
    rows = (q.shape[0], q.shape[1], selection.grid.q_blocks)
    if tuple(selection.counts.shape) != rows or tuple(selection.indices.shape[:3]) != rows:
        raise ValueError(
            f"selection must have rows [B, Hq, Qb] = {list(rows)}, got counts {_shape(selection.counts)} and "
            f"indices {_shape(selection.indices)}"
        )
    if selection.indices.dtype != torch.int32 or selection.counts.dtype != torch.int32:
        raise ValueError(f"selection must be int32, got {selection.indices.dtype} and {selection.counts.dtype}")
    if not selection.indices.device == selection.counts.device == q.device:
        raise ValueError(f"selection must be on q's device {q.device}, got {selection.indices.device}")


def check_window(window: int | None) -> None:
    """Check a sliding window's width in tokens."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an int of at least 1 token, got {window!r}")


def check_residual(residual: Residual, window: int | None) -> None:
    """Check what stands for pruned blocks, and that it is not asked for within a window."""
    if residual not in get_args(Residual):
        raise ValueError(f"residual must be one of {', '.join(get_args(Residual))}, got {residual!r}")
    if residual != "none" and window is not None:
        raise ValueError(
            f"residual={residual!r} cannot be combined with a window: blocks that have left it would return; "
            f"got window={window}"
        )


def _shape(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__
