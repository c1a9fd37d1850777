"""The backends, by name, and the choice among them."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from functools import cache

from torch import Tensor

from stem_attn.backends.base import Backend
from stem_attn.config import Residual

log = logging.getLogger("stem_attn")

# In the order in which automatic choice tries them.
_CLASSES = {
    "fa4": "stem_attn.backends.fa4:Fa4Backend",
    "triton": "stem_attn.backends.triton:TritonBackend",
    "cpu": "stem_attn.backends.cpu:CpuBackend",
}
_fallbacks: Counter[str] = Counter()


def names() -> tuple[str, ...]:
    """Return the backends' names, available here or not."""
    return tuple(_CLASSES)


def available() -> dict[str, str | None]:
    """Return every backend's name with None where it works here, and otherwise the reason why it does not."""
    return {name: _load(name)[1] for name in _CLASSES}


def fallbacks() -> dict[str, int]:
    """Return how often automatic choice passed over the fastest backend, by reason."""
    return dict(_fallbacks)


def choose(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    window: int | None = None,
    residual: Residual = "none",
    select: bool = False,
) -> Backend:
    """Find the backend for a call.

    Args:
        name: A backend's name, which is then used or refused, or `"auto"`.
        q: [B, Hq, Tq, D], validated with k and v.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        block_size: Tokens a block.
        window: Tokens of a sliding window, or None.
        residual: What stands for pruned blocks.
        select: Whether the backend is wanted for making a selection.

    Raises:
        ValueError: The name is unknown, or the named backend cannot take these inputs.
        RuntimeError: The named backend cannot run on this machine.
    """
    if name == "auto":
        return _automatic(q, k, v, block_size, window, residual, select)
    if name not in _CLASSES:
        raise ValueError(f"backend must be one of auto, {', '.join(_CLASSES)}; got {name!r}")
    backend, reason = _load(name)
    if backend is None or reason:
        raise RuntimeError(f"backend {name!r} is not available here: {reason}")
    if select and backend.selector:
        return choose(backend.selector, q, k, v, block_size=block_size)
    reason = backend.why_unsupported(q, k, v, block_size=block_size, window=window, residual=residual)
    if reason:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}")
    return backend


def _automatic(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, window: int | None, residual: Residual, select: bool
) -> Backend:
    """Take the first backend that suits the inputs and can run them; say once why a better one could not."""
    for name in _CLASSES:
        backend, reason = _load(name)
        if select and backend is not None and backend.selector:
            continue
        if backend is None:
            if name == "triton" and q.is_cuda:
                _note(f"{name}: {reason}")
            continue
        if not backend.suits(q, k, v, block_size=block_size):
            continue
        reason = reason or backend.why_unsupported(q, k, v, block_size=block_size, window=window, residual=residual)
        if reason is None:
            return backend
        _note(f"{name}: {reason}")
    raise RuntimeError(f"no backend can run on {q.device}: {available()}")


def _note(reason: str) -> None:
    if reason not in _fallbacks:
        log.warning("automatic choice passes over a faster backend (%s)", reason)
    _fallbacks[reason] += 1


@cache
def _load(name: str) -> tuple[Backend | None, str | None]:
    """Import a backend; return it, or None, with the reason why it is unavailable."""
    module, _, attribute = _CLASSES[name].partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
        return backend, backend.why_unavailable()
    except ImportError as error:
        return None, str(error)
