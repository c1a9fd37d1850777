"""Masks: the compact form that our mask function gives to attention, and back to what SDPA takes.

A compact mask is [B, seen], 0 where a token is padding; the queries are the last of the tokens seen, and a sliding
cache may hold keys of the last ones only. bool stands for causal attention; int32 for a sliding window, with the
window's width at real tokens. Shape and dtype survive what models, caches and device maps do to masks, which
attributes would not, and a compact mask that meets the mask function again (generate builds masks ahead for static
caches) comes out unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function


def stem_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Make the mask of one kind of layer; transformers calls this once per forward and kind.

    Args:
        batch_size: Rows B.
        q_length: Query tokens L.
        kv_length: Keys in the cache's tensors, unused places of a static cache included.
        q_offset: Tokens seen before the queries; a tensor for static caches.
        kv_offset: Position of the first key, above 0 where a sliding cache has dropped some.
        mask_function: Which (query, key) pairs may attend.
        attention_mask: [B, seen], false at padding; or None.
        local_size: Tokens of a sliding window or of chunked attention, or None.
        allow_is_causal_skip: True exactly for causal, sliding and chunked masks without further conditions.
        device: Where the mask is made.
        config: The model's config.
        kwargs: What SDPA's mask function takes besides.

    Returns:
        None for causal attention of the first tokens without padding; a compact mask; or, for everything else, what
        SDPA's mask function gives.
    """

    def delegate(allow_skip: bool) -> Tensor | None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_skip,
            device=device,
            config=config,
            **kwargs,
        )

    tracing = torch.compiler.is_compiling()
    if not allow_is_causal_skip or q_length == 1 or (isinstance(q_offset, Tensor) and tracing):
        return delegate(allow_is_causal_skip)
    seen = int(q_offset) + q_length
    window = local_size
    if local_size is not None and getattr(config, "attention_chunk_size", None) == local_size:
        if seen > local_size or tracing:  # several chunks: no band describes them
            return delegate(False)
        window = None

    if attention_mask is None:
        real = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    else:  # what the caller's mask does not reach counts as padding, as in transformers
        real = attention_mask.bool()[:, :seen]
        real = torch.nn.functional.pad(real, (0, seen - real.shape[1]))
    if window is not None:
        return real.int() * window
    if seen == q_length and (attention_mask is None or (not tracing and bool(real.all()))):
        return None
    return real


@dataclass(frozen=True, slots=True)
class Padding:
    """What a compact mask says, read on the host once for all layers.

    Args:
        rows: (first real token, end of the real tokens) of every batch row; None if some row has padding in between.
        window: Tokens of the sliding window, or None.
        full: Whether no token is padding.
    """

    rows: tuple[tuple[int, int], ...] | None
    window: int | None
    full: bool


# They drop an entry when its mask dies.
_read: MutableMapping[Tensor, Padding] = WeakTensorKeyDictionary()
_dense: MutableMapping[Tensor, dict[tuple[int, int], Tensor | None]] = WeakTensorKeyDictionary()


def read(mask: Tensor) -> Padding:
    """Read a compact mask; the result is kept as long as the mask lives."""
    known = _read.get(mask)
    if known is None:
        known = _read[mask] = _read_values(mask.cpu())
    return known


def _read_values(mask: Tensor) -> Padding:
    tokens = torch.arange(mask.shape[1])
    real = mask != 0
    count = real.sum(1)
    first = tokens.where(real, mask.shape[1]).amin(1)
    end = (tokens + 1).where(real, 0).amax(1)
    first = first.minimum(end)
    whole = bool((end - first == count).all())
    return Padding(
        rows=tuple(zip(first.tolist(), end.tolist(), strict=True)) if whole else None,
        window=None if mask.dtype == torch.bool else int(mask.max()),
        full=bool((count == mask.shape[1]).all()),
    )


def present_keys(mask: Tensor, key: Tensor) -> int:
    """Return how many tokens of a compact mask have keys [B, Hkv, n, D]: the last ones, first in the tensor."""
    return min(mask.shape[1], key.shape[2])


def to_dense(mask: Tensor, q_len: int, keys: int) -> Tensor | None:
    """Turn a compact mask into SDPA's for the last `q_len` queries and `keys` keys.

    Returns:
        bool [1 or B, 1, q_len, keys], or None for plain causal attention.
    """
    if torch.compiler.is_compiling():
        return _to_dense(mask, q_len, keys, mask.max() if mask.dtype != torch.bool else None, padded=True)
    known = _dense.setdefault(mask, {})
    if (q_len, keys) not in known:
        padding, seen = read(mask), mask.shape[1]
        window = padding.window if padding.window is not None and padding.window < seen else None
        plain = padding.full and window is None and q_len == keys == seen
        dense = None if plain else _to_dense(mask, q_len, keys, window, padded=not padding.full)
        known[q_len, keys] = dense
    return known[q_len, keys]


def _to_dense(mask: Tensor, q_len: int, keys: int, window: int | Tensor | None, *, padded: bool) -> Tensor:
    tokens = torch.arange(mask.shape[1], device=mask.device)
    queries, kept = tokens[-q_len:, None], tokens[-keys:]
    allowed = kept <= queries
    if window is not None:
        allowed = allowed & (kept > queries - window)
    allowed = allowed[None, None]
    return allowed & (mask[:, -keys:] != 0)[:, None, None] if padded else allowed
