"""Checks of what a caller passes: a ValueError says what was expected and what came, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from stem_attn.config import PRESETS, Residual, StemConfig

# Ready-made: torch.compile does not trace what makes them.
_PRESETS = {name: StemConfig.preset(name) for name in PRESETS}
_RESIDUALS = get_args(Residual)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check ranks, shapes, dtypes and devices, that there are numbers, and that no gradient is asked for."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(f"{name} must be a tensor [batch, heads, tokens, head_dim], got {shape_of(x)}")
    check_numbers(q, k, v)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"q, k and v must not be empty, got {shape_of(q)}, {shape_of(k)}, {shape_of(v)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and tokens, got {shape_of(k)} and {shape_of(v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head_dim, got {shape_of(q)} and {shape_of(k)}")
    check_heads(q.shape[1], k.shape[1])
    check_tokens(q.shape[2], k.shape[2])


def check_numbers(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check dtypes and devices, that there are numbers, and that no gradient is asked for."""
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if not torch.compiler.is_compiling() and (q.is_meta or isinstance(q, FakeTensor)):
        raise ValueError(
            "q, k and v must hold numbers: which blocks are kept depends on them; got meta or fake tensors"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse prefill has no backward: call it under torch.no_grad() or with detached inputs")


def check_heads(heads: int, kv_heads: int) -> None:
    """Check that KV heads serve query heads in equal groups."""
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}")


def check_tokens(q_len: int, k_len: int) -> None:
    """Check that every query has a key of its own."""
    if q_len > k_len:
        raise ValueError(f"q must not have more tokens than k, got {q_len} and {k_len}")


def resolve_config(config: StemConfig | str) -> StemConfig:
    """Return a config, from itself or from a preset's name."""
    if isinstance(config, str):
        return _PRESETS[config] if config in _PRESETS else StemConfig.preset(config)
    if not isinstance(config, StemConfig):
        raise ValueError(f"config must be a StemConfig or a preset's name, got {type(config).__name__}")
    return config


def resolve_device(device: torch.device | str) -> torch.device:
    """Return a device on which torch can make tensors here, from itself or from its name."""
    try:
        found = torch.device(device)
        torch.empty(1, dtype=torch.uint8, device=found)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:  # each kind of device has its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot use device {str(device)!r}: {reason}") from error
    return found


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the logits: the given one, or `1 / sqrt(head_dim)`."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)


def resolve_prompt_len(prompt_len: Any, batch: int, k_len: int) -> tuple[int, ...]:
    """Return the prompt's length: one int where all batch rows have the same, otherwise one a row.

    Args:
        prompt_len: An int, a sequence of ints, a tensor, or None for k_len.
        batch: Rows.
        k_len: Tokens that a prompt has at least.
    """
    if prompt_len is None:
        return (k_len,)
    if isinstance(prompt_len, Tensor):
        prompt_len = prompt_len.tolist()
    lengths = tuple(prompt_len) if isinstance(prompt_len, Sequence) else (prompt_len,) * batch
    if len(lengths) != batch or any(type(n) is not int or n < k_len for n in lengths):
        raise ValueError(
            f"prompt_len must be an int or {batch} ints of at least k's {k_len} tokens, got {prompt_len!r}"
        )
    return lengths if len(set(lengths)) > 1 else lengths[:1]


def sequence_prompt_len(prompt_len: int, sequence: int, k_len: int) -> tuple[int]:
    """Return the length of the prompt that one of several sequences belongs to, which has at least its k_len keys."""
    if prompt_len < k_len:
        raise ValueError(
            f"prompt_len must be at least a sequence's keys; sequence {sequence} has {k_len}, and got {prompt_len}"
        )
    return (prompt_len,)


def resolve_starts(name: str, value: Tensor | Sequence[int], tokens: int) -> list[int]:
    """Return where packed sequences start and end: rising ints from 0 to `tokens`."""
    starts = _to_list(name, value)
    rising = len(starts) > 1 and all(type(s) is int for s in starts) and all(a < b for a, b in pairwise(starts))
    if not rising or starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(f"{name} must be rising ints from 0 to {tokens} tokens, got {starts}")
    return starts


def resolve_lengths(name: str, value: Any, sequences: int) -> list[int]:
    """Return one length a sequence, from as many ints, or from one for all."""
    lengths = [value] * sequences if type(value) is int else _to_list(name, value)
    if len(lengths) != sequences or any(type(n) is not int or n < 1 for n in lengths):
        raise ValueError(f"{name} must be {sequences} ints of at least 1, one a sequence, got {lengths}")
    return lengths


def check_window(window: int | None) -> None:
    """Check a sliding window's width in tokens."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an int of at least 1 token, got {window!r}")


def check_residual(residual: Residual, window: int | None) -> None:
    """Check what stands for pruned blocks, and that it is not asked for within a window."""
    if residual not in _RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(_RESIDUALS)}, got {residual!r}")
    if residual != "none" and window is not None:
        raise ValueError(
            f"residual={residual!r} cannot be combined with a window: blocks that have left it would return; "
            f"got window={window}"
        )


def check_softcap(softcap: float | None) -> None:
    """Check what bounds the logits' magnitude."""
    if softcap is None:
        return
    number = isinstance(softcap, int | float) and not isinstance(softcap, bool)
    if not number or not math.isfinite(softcap) or softcap <= 0:
        raise ValueError(f"softcap must be None or a finite number above 0, got {softcap!r}")


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Check the sinks' form, not their values: a GPU would have to be asked for those."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or sinks.shape != q.shape[1:2] or not sinks.is_floating_point():
        got = f"{sinks.dtype} {shape_of(sinks)}" if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks must be None or a floating tensor [Hq] = [{q.shape[1]}], got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")
    if torch.is_grad_enabled() and sinks.requires_grad:
        raise ValueError("sparse prefill has no backward: call it under torch.no_grad() or with detached sinks")


def shape_of(x: Any) -> str:
    """Return a tensor's shape, or what else came in its place, for a message."""
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def _to_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a tensor or a sequence of ints, got {type(value).__name__}")
    return list(value)
