"""Sequences whose keys and values lie in pages of a shared cache, as serving engines keep them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from stem_attn import backends
from stem_attn.api import keep_everything
from stem_attn.backends.base import Backend
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import block_budget, keeps_everything
from stem_attn.checks import check_config, check_qkv, resolve_prompt_len, resolve_scale, resolve_starts
from stem_attn.config import StemConfig

_DEFAULT = StemConfig()


@overload
def stem_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    block_table: Tensor,
    config: StemConfig = _DEFAULT,
    prompt_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_selections: Literal[False] = False,
) -> Tensor: ...


@overload
def stem_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    block_table: Tensor,
    config: StemConfig = _DEFAULT,
    prompt_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_selections: Literal[True],
) -> tuple[Tensor, list[BlockSelection]]: ...


def stem_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    block_table: Tensor,
    config: StemConfig = _DEFAULT,
    prompt_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_selections: bool = False,
) -> Tensor | tuple[Tensor, list[BlockSelection]]:
    """Compute Stem's prefill within each of several sequences over a paged cache of keys and values.

    The Triton backend reads the cache through the block table; the others gather one sequence at a time. Nothing is
    asked back from the device where lengths are given on the host.

    Args:
        q: [T, Hq, D], the query tokens of all sequences, one after the other. Their keys and values are in the cache.
        k_cache: [pages, page_size, Hkv, D]; Hkv divides Hq. A view with any strides but the last, which is 1.
        v_cache: [pages, page_size, Hkv, Dv], likewise.
        cu_seqlens_q: S + 1 rising ints from 0 to T: where each sequence's queries start and end. A GPU tensor is
            read on the host, which waits for the GPU; so are the lengths below.
        seq_lens: Tokens of each sequence in the cache, S ints; its queries are the last of them.
        block_table: int32 [S, pages of the longest]; the page of every page_size tokens of a sequence. What lies past
            a sequence's end, in the table and in its last page, is not read.
        config: The method; see `StemConfig`. A block may be smaller or larger than a page.
        prompt_lens: Tokens of each sequence's whole prompt, coming chunks included, S ints. Default: `seq_lens`.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
        out: [T, Hq, Dv] in q's dtype, last stride 1, to write to. Default: a new tensor.
        return_selections: Whether to return the kept blocks too.

    Returns:
        out [T, Hq, Dv] in q's dtype; with `return_selections` also a `BlockSelection` of every sequence.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.

    Source: Stem (arXiv 2603.06274); paging as in PagedAttention (arXiv 2309.06180).
    """
    check_config(config)
    _check_tensors(q, k_cache, v_cache, block_table)
    starts = resolve_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    sequences = len(starts) - 1
    k_lens = _lengths("seq_lens", seq_lens, sequences)
    prompt_lens = k_lens if prompt_lens is None else _lengths("prompt_lens", prompt_lens, sequences)
    width = -(-max(k_lens) // k_cache.shape[1])
    if block_table.shape[0] != sequences or block_table.shape[1] < width:
        raise ValueError(
            f"block_table must have {sequences} rows, one a sequence, of at least {width} pages of {k_cache.shape[1]} "
            f"tokens; got {list(block_table.shape)}"
        )
    wanted = (*q.shape[:2], v_cache.shape[3])
    if out is None:
        out = q.new_empty(wanted)
    elif out.shape != wanted or out.dtype != q.dtype or out.device != q.device or out.stride(2) != 1:
        raise ValueError(
            f"out must be {q.dtype} {list(wanted)} on {q.device} with a last stride of 1, got {out.dtype} "
            f"{list(out.shape)} on {out.device} with strides {out.stride()}"
        )
    scale = resolve_scale(scale, q.shape[2])
    parts = []
    for (start, stop), k_len, prompt_len in zip(pairwise(starts), k_lens, prompt_lens, strict=True):
        query = q[start:stop].transpose(0, 1)[None]
        shapes = query, _like_sequence(k_cache, k_len), _like_sequence(v_cache, k_len)
        check_qkv(*shapes)
        resolve_prompt_len(prompt_len, 1, k_len)
        selector = backends.choose(backend, *shapes, block_size=config.block_size, select=True)
        attender = backends.choose(backend, *shapes, block_size=config.block_size, residual=config.residual)
        parts.append((query, k_len, prompt_len, selector))

    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # [pages, Hkv, page_size, D]
    selections = [
        _select(selector, query, k, v, pages, k_len, prompt_len, config, scale)
        for (query, k_len, prompt_len, selector), pages in zip(parts, block_table, strict=True)
    ]
    attender.attend_paged(q, k, v, block_table, selections, scale=scale, out=out, residual=config.residual)
    return (out, selections) if return_selections else out


def _select(
    selector: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    k_len: int,
    prompt_len: int,
    config: StemConfig,
    scale: float,
) -> BlockSelection:
    """Choose the kept blocks of one sequence."""
    grid = BlockGrid(q.shape[2], k_len, config.block_size)
    if keeps_everything(config, prompt_len, grid):
        return keep_everything(q, grid)
    budget = block_budget(config, prompt_len, grid)
    return selector.select_paged(q, k, v, pages, k_len, config=config, scale=scale, budget=budget)


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
    """Check what `check_qkv` does not: ranks of packed queries and caches, the caches' strides, the block table."""
    for name, x, rank, form in (
        ("q", q, 3, "[tokens, heads, head_dim]"),
        ("k_cache", k_cache, 4, "[pages, page_size, heads, head_dim]"),
        ("v_cache", v_cache, 4, "[pages, page_size, heads, head_dim]"),
    ):
        if not isinstance(x, Tensor) or x.ndim != rank or 0 in x.shape:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor {form}, none of them 0; got {shape}")
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            "k_cache and v_cache must agree in pages, page_size and heads and have a last stride of 1; got "
            f"{list(k_cache.shape)} with strides {k_cache.stride()} and {list(v_cache.shape)} with {v_cache.stride()}"
        )
    table = block_table if isinstance(block_table, Tensor) and block_table.ndim == 2 else None
    if table is None or table.dtype != torch.int32 or table.device != q.device or table.stride(1) != 1:
        got = "no such tensor" if table is None else f"{table.dtype} on {table.device} with strides {table.stride()}"
        raise ValueError(f"block_table must be int32 [sequences, pages] on {q.device}, last stride 1; got {got}")


def _lengths(name: str, value: Tensor | Sequence[int], sequences: int) -> list[int]:
    lengths = value.tolist() if isinstance(value, Tensor) else list(value)
    if len(lengths) != sequences or any(type(n) is not int or n < 1 for n in lengths):
        raise ValueError(f"{name} must be {sequences} ints of at least 1, one a sequence, got {lengths}")
    return lengths


def _like_sequence(cache: Tensor, tokens: int) -> Tensor:
    """Return a tensor of a sequence's shape, [1, Hkv, tokens, D], dtype and device; its numbers mean nothing."""
    return cache[:1, :1].transpose(1, 2).expand(-1, -1, tokens, -1)
