"""The entry point `vllm.general_plugins`: vLLM calls `register` in every process it starts, maybe more than once."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

log = logging.getLogger("vllm.stem")

NAME = "STEM"
_PACKAGE = "stem_attn.integrations.vllm"
_CPU = f"{_PACKAGE}.cpu.StemCpuBackend"
_CUDA = f"{_PACKAGE}.cuda.StemCudaBackend"


def register() -> None:
    """Make the attention backend STEM known to vLLM; CUSTOM too, unless another plugin has taken it.

    Where vLLM lets nobody name a backend, CUSTOM alone. Where it lacks something that the plugin uses, nothing.

    Nothing is switched on. vLLM's CPU platform ignores which backend is asked for and takes CPU_ATTN's class, so there
    that class is replaced by a subclass, which does what its parent does until Stem is selected.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        log.info("stem-attn runs on vLLM's CPU and CUDA platforms: the attention backend %s is not registered", NAME)
        return
    if not _fits("cpu" if current_platform.is_cpu() else "cuda"):
        return

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from stem_attn.integrations.vllm.compat import names_backends

    path = _CPU if current_platform.is_cpu() else _CUDA
    if names_backends() and NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, path)
        # A process that is spawned unpickles its config before it loads plugins, and would not know the name.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (_registered, ())
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, path)


@cache
def _fits(platform: str) -> bool:
    """Tell whether the installed vLLM has what the plugin uses; say once what it lacks, or that nobody has run it."""
    from stem_attn.integrations.vllm import compat

    reason = compat.why_unsupported(platform)
    if reason:
        log.warning("%s. The attention backend %s is not registered", reason, NAME)
        return False
    unknown = compat.why_unknown(platform)
    if unknown:
        log.warning("%s: it has what is needed, so the attention backend %s is registered", unknown, NAME)
    return True


def _registered() -> Any:
    """Return the member STEM, in a process that may not have it yet."""
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[NAME]


def is_stem(backend: Any) -> bool:
    """Tell whether a member of vLLM's enum (or None) stands for Stem."""
    if backend is None or backend.name not in (NAME, "CUSTOM"):
        return False
    return bool(backend.get_path() in (_CPU, _CUDA))
