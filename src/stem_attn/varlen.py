"""Sequences of different lengths, packed one after the other without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from stem_attn import backends
from stem_attn.api import select_blocks
from stem_attn.checks import check_qkv, resolve_prompt_len, resolve_scale, resolve_starts
from stem_attn.config import StemConfig

_DEFAULT = StemConfig()


def stem_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    config: StemConfig = _DEFAULT,
    scale: float | None = None,
    prompt_len: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute Stem's prefill within each of several packed sequences.

    Args:
        q: [T, Hq, D], the query tokens of all sequences.
        k: [Tk, Hkv, D], the key tokens of all sequences; Hkv divides Hq.
        v: [Tk, Hkv, Dv].
        cu_seqlens_q: N + 1 rising ints from 0 to T: where each sequence's queries start and end. A GPU tensor is
            read on the host, which waits for the GPU.
        cu_seqlens_k: The same for keys, from 0 to Tk; a sequence's queries are the last of its keys. Default: as
            for queries.
        config: The method; see `StemConfig`.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        prompt_len: Tokens of each sequence's whole prompt, N ints. Default: its keys.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        out [T, Hq, Dv] in q's dtype.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 3:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a packed tensor [tokens, heads, head_dim], got {shape}")
    starts_q = resolve_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = starts_q if cu_seqlens_k is None else resolve_starts("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    sequences = len(starts_q) - 1
    if len(starts_k) != len(starts_q) or starts_k[-1] != k.shape[0]:
        raise ValueError(f"cu_seqlens_k must be {sequences + 1} rising ints from 0 to {k.shape[0]}, got {starts_k}")
    lengths = [None] * sequences if prompt_len is None else list(prompt_len)
    if len(lengths) != sequences:
        raise ValueError(f"prompt_len must have {sequences} entries, one a sequence, got {len(lengths)}")

    # [1, H, tokens, D] views, one a sequence
    parts = [
        tuple(x[start:stop].transpose(0, 1)[None] for x, (start, stop) in ((q, q_span), (k, k_span), (v, k_span)))
        for q_span, k_span in zip(pairwise(starts_q), pairwise(starts_k), strict=True)
    ]
    for part, n in zip(parts, lengths, strict=True):
        check_qkv(*part)
        resolve_prompt_len(None if n is None else int(n), 1, part[1].shape[2])
    selections = [
        select_blocks(*part, config=config, scale=scale, prompt_len=None if n is None else int(n), backend=backend)
        for part, n in zip(parts, lengths, strict=True)
    ]
    chosen = backends.choose(backend, *parts[0], block_size=config.block_size, residual=config.residual)
    scale = resolve_scale(scale, q.shape[2])
    return chosen.attend_packed(q, k, v, selections, scale=scale, residual=config.residual)
