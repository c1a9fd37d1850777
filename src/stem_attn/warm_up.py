"""Compile ahead what prefills of a shape will need, so that the first long prompt does not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from stem_attn import backends, run
from stem_attn.api import Config, block_sparse_attention, stem_attention, stem_attention_paged
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.checks import resolve_config, resolve_device
from stem_attn.config import check_int
from stem_attn.layout import Layout

_MANY = 8  # sequences


def warm_up(
    *,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    max_len: int,
    chunk: int | None = None,
    page_size: int | None = None,
    config: Config = "default",
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.dtype | None = None,
    audit_rows: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    backend: str = "auto",
) -> None:
    """Run prefills of zeros, of every size class up to a length, and throw their results away.

    Kernels are compiled for head dims, page sizes and settings, and for some bounds of the length: those of its powers
    of two. What a process or Triton's cache on disk has compiled already takes milliseconds.

    Args:
        query_heads: Hq.
        kv_heads: Hkv, divides Hq.
        head_dim: D, of keys and values.
        max_len: Tokens of the longest prompt.
        chunk: The most query tokens of one call; default: a prompt is one call.
        page_size: Tokens a page of the cache, where `stem_attention_paged` will be called; default: `stem_attention`.
        config: The method's settings: a `StemConfig`, or a preset's name.
        window: As in `block_sparse_attention`, where layers with a sliding window will attend in bands; default: there
            are none, or they are in pages, which are not attended to in bands.
        softcap: As in `stem_attention`.
        sinks: Their dtype; default: there are none.
        audit_rows: As in `PrefillPolicy`, where prefills will be audited, with a target or without.
        dtype: Of queries, keys and values.
        device: Where prefills will run.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Raises:
        ValueError: A number is no positive int, there is no such device here, the backend cannot take such calls, or
            a window is given for pages.
        RuntimeError: The named backend is not available here.
    """
    sizes = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "max_len": max_len}
    for name, size in {**sizes, "chunk": chunk, "page_size": page_size, "window": window}.items():
        if size is not None:
            check_int(name, size, 1)
    if window is not None and page_size is not None:
        raise ValueError(f"window={window} and page_size={page_size}: pages are not attended to in bands")
    check_int("audit_rows", audit_rows, 0)
    config = resolve_config(config)
    device = resolve_device(device)
    sink = None if sinks is None else torch.zeros(query_heads, dtype=sinks, device=device)
    calls = [(q_len, k_len, 1) for q_len, k_len in _calls(max_len, chunk or max_len, config.block_size)]
    if page_size is not None:  # many short sequences may go in one launch of another kernel
        calls.append((1, max_len, _MANY))
    for q_len, k_len, count in calls:
        asked: dict[str, Any] = {"softcap": softcap, "sinks": sink}
        if page_size is None:
            q = torch.zeros(1, query_heads, q_len, head_dim, dtype=dtype, device=device)
            k = torch.zeros(1, kv_heads, k_len, head_dim, dtype=dtype, device=device)
            layout = Layout.dense(q, k, k)
            out, kept = stem_attention(q, k, k, config=config, backend=backend, return_selection=True, **asked)
            if window is not None:
                of = {"block_size": config.block_size, "q_len": q_len, "k_len": k_len, "window": window}
                band = BlockSelection.band(batch=1, heads=query_heads, device=device, **of)
                block_sparse_attention(q, k, k, band, window=window, backend=backend, **asked)
        else:
            q = torch.zeros(count * q_len, query_heads, head_dim, dtype=dtype, device=device)
            page = torch.zeros(1, page_size, kv_heads, head_dim, dtype=dtype, device=device)
            table = torch.zeros(count, -(-k_len // page_size), dtype=torch.int32, device=device)
            sequences: dict[str, Any] = {
                "cu_seqlens_q": list(range(0, count * q_len + 1, q_len)),
                "seq_lens": [k_len] * count,
                "block_table": table,
            }
            layout = Layout.paged(q, page, page, **sequences)
            out, (kept, *_) = stem_attention_paged(
                q, page, page, **sequences, config=config, backend=backend, return_selection=True, **asked
            )
            out = out.transpose(0, 1)[None]
        if audit_rows and count == 1:  # each sequence alone
            call = Call(layout, config.block_size, head_dim**-0.5, **asked)
            chosen = backends.for_call(backend, call, again=True)
            sums = run.audit(call, [kept], out, chosen, rows=audit_rows, seed=0)
            missed = chosen.misses(sums.values, sums.queries, sums.rows, 0.5, 0.5)
            if missed is not None:
                chosen.attend_if(call, missed, out)


def _calls(max_len: int, chunk: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Yield tokens of queries and of keys: the ends of prompts of 1, 2, 4 ... blocks up to the longest.

    Each in a long and in a short last chunk, and with a number of blocks that has no power of two in it.
    """
    length = max_len
    while True:
        for k_len in (length, length - block_size - block_size // 2):
            if k_len > 0:
                yield from {(min(chunk, k_len), k_len), (min(chunk, k_len, block_size + 1), k_len)}
        if length <= block_size:
            return
        length = 1 << (length - 1).bit_length() - 1
