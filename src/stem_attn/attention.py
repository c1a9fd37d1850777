"""Exact attention over a selection, on the backend that is asked for or fits."""

from __future__ import annotations

from typing import Literal, cast, overload

import torch
from torch import Tensor

from stem_attn import backends
from stem_attn.backends.base import empty_output
from stem_attn.blocks import BlockSelection
from stem_attn.checks import check_qkv, check_residual, check_selection, check_window, resolve_scale
from stem_attn.config import Residual


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    window: int | None = None,
    residual: Residual = "none",
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    window: int | None = None,
    residual: Residual = "none",
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    window: int | None = None,
    residual: Residual = "none",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend causally over the key blocks that a selection keeps.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens; query i sees keys `j <= i + Tk - Tq`.
        k: [B, Hkv, Tk, D]; Hkv divides Hq.
        v: [B, Hkv, Tk, Dv].
        selection: The kept blocks, made for these lengths.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        window: Tokens: keep only keys `i - window < j <= i`, inside edge blocks too. Default: no window.
        residual: What stands for pruned blocks before a query's own: `"none"`, or `"mean"`: each joins as one key and
            one value, the means of its tokens, with the weight of that many. Not with a window.
        return_lse: Whether to return the log-sum-exp too.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with `return_lse` also the natural log-sum-exp of the logits, float32
        [B, Hq, Tq]: of the kept ones, and of the means' with a residual.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.
    """
    check_qkv(q, k, v)
    check_selection(selection, q, k)
    check_window(window)
    check_residual(residual, window)
    scale = resolve_scale(scale, q.shape[3])
    if torch.compiler.is_compiling():
        indices, counts, size = selection.indices, selection.counts, selection.block_size
        out, lse = _op(q, k, v, indices, counts, size, scale, window or 0, residual, return_lse, backend)
    else:
        out, lse = _attend(q, k, v, selection, scale, window, residual, return_lse, backend)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float,
    window: int | None,
    residual: Residual,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Choose a backend and run it, all arguments checked."""
    chosen = backends.choose(backend, q, k, v, block_size=selection.block_size, window=window, residual=residual)
    if residual == "mean":
        return chosen.attend_residual(q, k, v, selection, scale=scale, return_lse=return_lse)
    return chosen.attend(q, k, v, selection, scale=scale, window=window, return_lse=return_lse)


@torch.library.custom_op("stem_attn::block_sparse_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float,
    window: int,
    residual: str,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The opaque form that torch.compile sees: no window is 0, no log-sum-exp is an empty tensor."""
    selection = BlockSelection(indices, counts, block_size, q.shape[2], k.shape[2])
    out, lse = _attend(q, k, v, selection, scale, window or None, cast(Residual, residual), return_lse, backend)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float,
    window: int,
    residual: str,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return empty_output(q, v), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
