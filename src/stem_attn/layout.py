"""Where the tokens of a call lie: sequences side by side in a batch, packed one after the other, or in pages.

A layout is a value. What attends or selects asks it for its parts; nothing else knows that there are three kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stem_attn.checks import (
    check_heads,
    check_numbers,
    check_qkv,
    check_tokens,
    resolve_lengths,
    resolve_prompt_len,
    resolve_starts,
    sequence_prompt_len,
    shape_of,
)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Sequences of one call that have the same lengths: all batch rows, or one packed or paged sequence.

    Args:
        q: [B, Hq, Tq, D], a view of the call's queries.
        k: [B, Hkv, Tk, D]; with `pages` the whole cache, [pages, Hkv, page_size, D], and then B is 1.
        v: [B, Hkv, Tk, Dv], likewise.
        pages: int32, last stride 1: the page of every page_size tokens of the sequence; past its end may stand
            anything. None where keys and values are not in pages.
        q_len: Tq, the last of k_len tokens.
        k_len: Tk.
        prompt_lens: Tokens of the whole prompt: one int for all batch rows, or one a row.
        tokens: Where the part's queries lie among the call's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pages: Tensor | None
    q_len: int
    k_len: int
    prompt_lens: tuple[int, ...]
    tokens: slice

    def gather(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv], copied out of their pages if need be."""
        if self.pages is None:
            return self.k, self.v
        used = self.pages[: -(-self.k_len // self.k.shape[2])].long()
        k, v = (x[used].transpose(0, 1).flatten(1, 2)[None, :, : self.k_len] for x in (self.k, self.v))
        return k, v


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The queries, keys and values of a call, checked, and its parts.

    Args:
        q: [B, Hq, T, D]; where sequences are packed or paged, B is 1 and T counts the tokens of all.
        k: [B, Hkv, Tk, D], or [pages, Hkv, page_size, D].
        v: [B, Hkv, Tk, Dv], or [pages, Hkv, page_size, Dv].
        block_table: int32 [sequences, pages of the longest], last stride 1; None where nothing is in pages.
        parts: At least one; in the order of q's tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor | None
    parts: tuple[Part, ...]

    @property
    def page_size(self) -> int:
        """Tokens a page; 0 where nothing is in pages."""
        return 0 if self.block_table is None else self.k.shape[2]

    @classmethod
    def dense(cls, q: Tensor, k: Tensor, v: Tensor, prompt_len: Any = None) -> Layout:
        """Describe a batch of sequences of one length.

        Args:
            q: [B, Hq, Tq, D], the last Tq of Tk tokens.
            k: [B, Hkv, Tk, D]; Hkv divides Hq.
            v: [B, Hkv, Tk, Dv].
            prompt_len: Tokens of the whole prompt, one int or one a batch row. Default: Tk.

        Raises:
            ValueError: The inputs do not fit together.
        """
        check_qkv(q, k, v)
        q_len, k_len = q.shape[2], k.shape[2]
        lengths = resolve_prompt_len(prompt_len, q.shape[0], k_len)
        return cls(q, k, v, None, (Part(q, k, v, None, q_len, k_len, lengths, slice(0, q_len)),))

    @classmethod
    def packed(
        cls, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any = None, prompt_len: Any = None
    ) -> Layout:
        """Describe sequences that are packed one after the other.

        Args:
            q: [T, Hq, D].
            k: [Tk, Hkv, D]; Hkv divides Hq.
            v: [Tk, Hkv, Dv].
            cu_seqlens_q: N + 1 rising ints from 0 to T.
            cu_seqlens_k: N + 1 rising ints from 0 to Tk. Default: as for queries.
            prompt_len: Tokens of each whole prompt: N ints, or one for all. Default: the sequence's keys.

        Raises:
            ValueError: The inputs do not fit together.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor) or x.ndim != 3:
                raise ValueError(f"{name} must be a packed tensor [tokens, heads, head_dim], got {shape_of(x)}")
        starts_q = resolve_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        starts_k = starts_q if cu_seqlens_k is None else resolve_starts("cu_seqlens_k", cu_seqlens_k, k.shape[0])
        count = len(starts_q) - 1
        if len(starts_k) != len(starts_q) or starts_k[-1] != k.shape[0]:
            raise ValueError(f"cu_seqlens_k must be {count + 1} rising ints from 0 to {k.shape[0]}, got {starts_k}")
        told = None if prompt_len is None else resolve_lengths("prompt_len", prompt_len, count)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        parts = []
        for n, ((q_start, q_stop), (k_start, k_stop)) in enumerate(
            zip(pairwise(starts_q), pairwise(starts_k), strict=True)
        ):
            tokens, keys = slice(q_start, q_stop), slice(k_start, k_stop)
            query, key, value = q[:, :, tokens], k[:, :, keys], v[:, :, keys]
            check_qkv(query, key, value)
            q_len, k_len = q_stop - q_start, k_stop - k_start
            lengths = (k_len,) if told is None else sequence_prompt_len(told[n], n, k_len)
            parts.append(Part(query, key, value, None, q_len, k_len, lengths, tokens))
        return cls(q, k, v, None, tuple(parts))

    @classmethod
    def paged(
        cls,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cu_seqlens_q: Any,
        seq_lens: Any,
        block_table: Tensor,
        prompt_len: Any = None,
    ) -> Layout:
        """Describe sequences whose keys and values lie in pages of a cache.

        Args:
            q: [T, Hq, D], the query tokens of all sequences, one after the other.
            k_cache: [pages, page_size, Hkv, D]; the last stride is 1.
            v_cache: [pages, page_size, Hkv, Dv], likewise.
            cu_seqlens_q: N + 1 rising ints from 0 to T.
            seq_lens: Tokens of each sequence in the cache, N ints.
            block_table: int32 [N, pages of the longest], last stride 1.
            prompt_len: Tokens of each whole prompt: N ints, or one for all. Default: `seq_lens`.

        Raises:
            ValueError: The inputs do not fit together.
        """
        _check_paged(q, k_cache, v_cache, block_table)
        starts = resolve_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        count = len(starts) - 1
        k_lens = resolve_lengths("seq_lens", seq_lens, count)
        told = k_lens if prompt_len is None else resolve_lengths("prompt_len", prompt_len, count)
        width = -(-max(k_lens) // k_cache.shape[1])
        if block_table.shape[0] != count or block_table.shape[1] < width:
            raise ValueError(
                f"block_table must have {count} rows, one a sequence, of at least {width} pages of {k_cache.shape[1]} "
                f"tokens; got {list(block_table.shape)}"
            )
        q, k, v = q.transpose(0, 1)[None], k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        parts = []
        for n, (start, stop) in enumerate(pairwise(starts)):
            tokens, k_len = slice(start, stop), k_lens[n]
            check_tokens(stop - start, k_len)
            query = q if count == 1 else q[:, :, tokens]
            lengths = sequence_prompt_len(told[n], n, k_len)
            parts.append(Part(query, k, v, block_table[n], stop - start, k_len, lengths, tokens))
        return cls(q, k, v, block_table, tuple(parts))


def _check_paged(q: Any, k_cache: Any, v_cache: Any, block_table: Any) -> None:
    """Check what does not differ between sequences."""
    for name, x, rank, form in (
        ("q", q, 3, "[tokens, heads, head_dim]"),
        ("k_cache", k_cache, 4, "[pages, page_size, heads, head_dim]"),
        ("v_cache", v_cache, 4, "[pages, page_size, heads, head_dim]"),
    ):
        if not isinstance(x, Tensor) or x.ndim != rank or 0 in x.shape:
            raise ValueError(f"{name} must be a tensor {form}, none of them 0; got {shape_of(x)}")
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            "k_cache and v_cache must agree in pages, page_size and heads and have a last stride of 1; got "
            f"{list(k_cache.shape)} with strides {k_cache.stride()} and {list(v_cache.shape)} with {v_cache.stride()}"
        )
    check_numbers(q, k_cache, v_cache)
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"q and k_cache must agree in head_dim, got {shape_of(q)} and {shape_of(k_cache)}")
    check_heads(q.shape[1], k_cache.shape[2])
    table = block_table if isinstance(block_table, Tensor) and block_table.ndim == 2 else None
    if table is None or table.dtype != torch.int32 or table.device != q.device or table.stride(1) != 1:
        got = "no such tensor" if table is None else f"{table.dtype} on {table.device} with strides {table.stride()}"
        raise ValueError(f"block_table must be int32 [sequences, pages] on {q.device}, last stride 1; got {got}")
