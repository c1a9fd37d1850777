"""Exact attention over a selection, on the backend that is asked for or fits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from stem_attn import backends
from stem_attn.backends.base import empty_output
from stem_attn.blocks import BlockSelection
from stem_attn.checks import check_qkv, check_selection, check_window, resolve_scale


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    window: int | None = None,
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
        return_lse: Whether to return the log-sum-exp too.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with `return_lse` also the natural log-sum-exp of the kept logits, float32
        [B, Hq, Tq].

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.
    """
    check_qkv(q, k, v)
    check_selection(selection, q, k)
    check_window(window)
    scale = resolve_scale(scale, q.shape[3])
    if torch.compiler.is_compiling():
        out, lse = _op(
            q, k, v, selection.indices, selection.counts, selection.block_size, scale, window or 0, return_lse, backend
        )
    else:
        chosen = backends.choose(backend, q, k, v, block_size=selection.block_size, window=window)
        out, lse = chosen.attend(q, k, v, selection, scale=scale, window=window, return_lse=return_lse)
    return (out, lse) if return_lse else out


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
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The opaque form that torch.compile sees: no window is 0, no log-sum-exp is an empty tensor."""
    selection = BlockSelection(indices, counts, block_size, q.shape[2], k.shape[2])
    chosen = backends.choose(backend, q, k, v, block_size=block_size, window=window or None)
    out, lse = chosen.attend(q, k, v, selection, scale=scale, window=window or None, return_lse=return_lse)
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
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return empty_output(q, v), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
