"""Masks: the compact form that our mask function gives to attention, and back to what SDPA takes.

A compact mask is int32 [B, 1, 1, N], one number a token. Its tokens are the N first ones of the sequence: those that a
sliding cache has dropped, those whose keys it holds, and the unused places of a static cache. The queries are the last
of the tokens seen. A number says, bit by bit, whether the token is real (not padding), held and seen; the bits above
are the width of the sliding window in tokens, 0 for full attention.

All of it stands in the values, because they survive what models, caches and device maps do to masks, which attributes
would not: models cut a mask's third dimension to some last queries (Gemma 4), and hand 4-D masks on as they are
(generate builds masks ahead for static caches). No mask of SDPA is int32.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

_REAL, _HELD, _SEEN = 1, 2, 4
_WINDOW_SHIFT = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """What a compact mask says, read on the host once for all layers.

    Args:
        rows: (first real token, end of the real tokens) of every batch row; None if some row has padding in between.
        window: Tokens of the sliding window, or None.
        full: Whether no token is padding.
        seen: Tokens up to the last query, those that a sliding cache has dropped included.
        held: Keys in the cache's tensors, unused places included.
        present: Keys of tokens seen among those: the first in the tensors.
    """

    rows: tuple[tuple[int, int], ...] | None
    window: int | None
    full: bool
    seen: int
    held: int
    present: int


# They drop an entry when its mask dies.
_read: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()
_dense: MutableMapping[Tensor, dict[int, Tensor | None]] = WeakTensorKeyDictionary()


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
        None for causal attention of the first tokens without padding, as SDPA takes it; a compact mask; or, for
        everything else, what SDPA's mask function gives.

    Raises:
        ValueError: The attention mask is neither [B, tokens] nor 4-D.
    """
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size):
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask must be [batch, tokens] with batch {batch_size}, or 4-D; got {shape}")

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

    # Models whose last layers share keys may cut the queries to the last ones, which None would not tell.
    plain = window is None and seen == q_length and not getattr(config, "num_kv_shared_layers", 0)
    if plain and (attention_mask is None or (not tracing and _all_real(attention_mask, seen))):
        return None
    total = kv_offset + kv_length
    tokens = torch.arange(total, device=device, dtype=torch.int32)
    is_seen = tokens < seen
    code = _HELD * (tokens >= kv_offset) + _SEEN * is_seen + ((window or 0) << _WINDOW_SHIFT)
    real = is_seen.expand(batch_size, total)
    if attention_mask is not None:  # what the caller's mask does not reach counts as padding, as in transformers
        told = attention_mask.to(device=device, dtype=torch.bool)[:, :total]
        real = real & torch.nn.functional.pad(told, (0, total - told.shape[1]))
    mask = (code + _REAL * real).to(torch.int32)[:, None, None]
    if attention_mask is None and not tracing:  # known without asking the device
        _read[mask] = Layout(((0, seen),) * batch_size, window, True, seen, kv_length, seen - kv_offset)
    return mask


def _all_real(attention_mask: Tensor, seen: int) -> bool:
    return attention_mask.shape[1] >= seen and bool(attention_mask[:, :seen].all())


def is_compact(mask: Tensor) -> bool:
    """Tell a compact mask from one of SDPA's."""
    return mask.ndim == 4 and mask.dtype == torch.int32


def layout(mask: Tensor | None, batch: int, q_len: int) -> Layout:
    """Read a compact mask, or None, which stands for a call of the first tokens without padding.

    What was read is kept as long as the mask lives.
    """
    if mask is None:
        return Layout(((0, q_len),) * batch, None, True, q_len, q_len, q_len)
    known = _read.get(mask)
    if known is None:
        known = _read[mask] = _read_values(mask[:, 0, 0].cpu())
    return known


def _read_values(mask: Tensor) -> Layout:
    real, held, seen = (mask & bit != 0 for bit in (_REAL, _HELD, _SEEN))
    tokens = torch.arange(mask.shape[1], device=mask.device)
    count = real.sum(1)
    first = tokens.where(real, mask.shape[1]).amin(1)
    end = (tokens + 1).where(real, 0).amax(1)
    first = first.minimum(end)
    whole = bool((end - first == count).all())
    seen_count = int(seen[0].sum())
    return Layout(
        rows=tuple(zip(first.tolist(), end.tolist(), strict=True)) if whole else None,
        window=(int(mask[0, 0]) >> _WINDOW_SHIFT) or None,
        full=bool((count == seen_count).all()),
        seen=seen_count,
        held=int(held[0].sum()),
        present=int((held & seen)[0].sum()),
    )


def to_dense(mask: Tensor, q_len: int) -> Tensor | None:
    """Turn a compact mask into SDPA's, for the last `q_len` queries and the keys that are present.

    Returns:
        bool [1 or B, 1, q_len, present], or None for plain causal attention.
    """
    known = _dense.setdefault(mask, {})
    if q_len not in known:
        lay = layout(mask, mask.shape[0], q_len)
        window = lay.window if lay.window is not None and lay.window < lay.seen else None
        plain = lay.full and window is None and q_len == lay.present == lay.seen
        present = mask[..., lay.seen - lay.present : lay.seen]
        known[q_len] = None if plain else _allowed(present, q_len, lay.present, window, padded=not lay.full)
    return known[q_len]


def to_dense_traced(mask: Tensor, q_len: int, held: int) -> Tensor:
    """Do as `to_dense` within a graph, where nothing can be read: for all keys held, as tensors of `held` keys.

    Returns:
        bool [B, 1, q_len, held].
    """
    seen = (mask[0, 0, 0] & _SEEN != 0).sum() - (mask.shape[3] - held)  # counted from the first key held
    window = mask[0, 0, 0, 0] >> _WINDOW_SHIFT
    window = window.where(window > 0, mask.shape[3])
    return _allowed(mask[..., mask.shape[3] - held :], q_len, seen, window, padded=True)


def _allowed(mask: Tensor, q_len: int, seen: int | Tensor, window: int | Tensor | None, *, padded: bool) -> Tensor:
    """Which of a mask's keys the last `q_len` of its `seen` tokens may attend to."""
    queries = torch.arange(q_len, device=mask.device)[:, None] + (seen - q_len)
    keys = torch.arange(mask.shape[3], device=mask.device)
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    allowed = allowed[None, None]
    return allowed & (mask & _REAL != 0) if padded else allowed
