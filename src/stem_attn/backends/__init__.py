"""The backends, by name, and the choice among them."""

from __future__ import annotations

import importlib
from functools import cache

import torch

from stem_attn import fallbacks as fallback_notes
from stem_attn.backends.base import Backend
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Layout

# In the order in which automatic choice tries them.
_CLASSES = {
    "triton": "stem_attn.backends.triton:TritonBackend",
    "fa4": "stem_attn.backends.fa4:Fa4Backend",
    "cpu": "stem_attn.backends.cpu:CpuBackend",
}


def names() -> tuple[str, ...]:
    """Return the backends' names, available here or not."""
    return tuple(_CLASSES)


def available() -> dict[str, str | None]:
    """Return every backend's name with None where it works here, and otherwise the reason why it does not."""
    return {name: _load(name)[1] for name in _CLASSES}


def fallbacks() -> dict[str, int]:
    """Return how often automatic choice passed over the fastest backend, or one ran in a slower way, by reason."""
    return fallback_notes.counts()


def for_call(name: str, call: Call, *, again: bool = False) -> Backend:
    """Find the backend that runs a call.

    Args:
        name: A backend's name, which is then used or refused, or `"auto"`.
        call: The call.
        again: Whether the call has run already, so that what automatic choice passes over is counted.

    Raises:
        ValueError: The name is unknown, or the named backend cannot take the call.
        RuntimeError: The named backend cannot run on this machine.
    """
    if name == "auto":
        return _automatic(call, again)
    backend = by_name(name)
    reason = backend.why_unsupported(call)
    if reason:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}")
    return backend


def check_ahead(
    name: str,
    config: StemConfig,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    softcap: float | None = None,
) -> None:
    """Check, before there is a prompt, that prefills have a backend: what one token of them would say.

    Args:
        name: A backend's name or `"auto"`.
        config: The method's settings.
        head_dim: D, of keys and values.
        dtype: Of queries, keys and values.
        device: Where prefills will run.
        softcap: As in `Call`.

    Raises:
        ValueError: The name is unknown, or no backend, or not the named one, computes what is asked for.
        RuntimeError: The named backend cannot run on this machine.
    """
    one = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    call = Call(Layout.dense(one, one, one), config.block_size, 1.0, softcap=softcap, precision=config.precision)
    for_call(name, call, again=True)  # prompts tell what automatic choice passes over


def selector_of(backend: Backend, call: Call) -> Backend:
    """Return the backend that makes a backend's selections, often itself.

    Raises:
        ValueError: It cannot take the call.
        RuntimeError: It cannot run on this machine.
    """
    return backend if backend.selector is None else for_call(backend.selector, call)


def by_name(name: str) -> Backend:
    """Return a backend that this machine can run.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend cannot run on this machine.
    """
    if name not in _CLASSES:
        raise ValueError(f"backend must be one of auto, {', '.join(_CLASSES)}; got {name!r}")
    backend, reason = _load(name)
    if backend is None or reason:
        raise RuntimeError(f"backend {name!r} is not available here: {reason}")
    return backend


def expected(name: str, device_type: str) -> Backend | None:
    """Return the backend that calls on a type of device will run on, as far as can be told without one; None: none.

    Args:
        name: A backend's name or `"auto"`.
        device_type: `torch.device.type`.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named backend cannot run on this machine.
    """
    if name != "auto":
        return by_name(name)
    for candidate in _CLASSES:
        backend, reason = _load(candidate)
        if backend is not None and reason is None and _is_tried(backend, device_type):
            return backend
    return None


def _automatic(call: Call, again: bool) -> Backend:
    """Take the first backend made for the device that can run the call; say once why a better one could not."""
    backend, passed_over = _fastest(call)
    if backend is None and call.precision != "auto":  # asked for by name: nothing stands in for it
        raise ValueError(f"no backend can run this call with precision={call.precision!r}: {'; '.join(passed_over)}")
    if not again:
        for reason in passed_over:
            fallback_notes.note("automatic choice passes over a faster backend", reason)
    if backend is None:
        raise RuntimeError(f"no backend can run on {call.q.device}: {available()}")
    return backend


def _fastest(call: Call) -> tuple[Backend | None, list[str]]:
    """Return the first backend made for the device that can run the call, and why each before it could not."""
    device_type = call.q.device.type
    passed_over = []
    for name in _CLASSES:
        backend, reason = _load(name)
        if backend is None:
            if name == "triton" and device_type == "cuda":
                passed_over.append(f"{name}: {reason}")
            continue
        if not _is_tried(backend, device_type):
            continue
        reason = reason or backend.why_unsupported(call)
        if reason is None:
            return backend, passed_over
        passed_over.append(f"{name}: {reason}")
    return None, passed_over


def _is_tried(backend: Backend, device_type: str) -> bool:
    return device_type in backend.automatic_on or "*" in backend.automatic_on


@cache
def _load(name: str) -> tuple[Backend | None, str | None]:
    """Import a backend; return it, or None, with the reason why it is unavailable."""
    module, _, attribute = _CLASSES[name].partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
        return backend, backend.why_unavailable()
    except ImportError as error:
        return None, str(error)
