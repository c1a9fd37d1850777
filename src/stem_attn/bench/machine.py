"""What the numbers were measured with: versions, device, driver, and the machine's own limit."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stem_attn import __version__
from stem_attn.bench.timing import Run

_PACKAGES = ("torch", "triton", "transformers", "flash-attn-4", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_LIMIT_SIZE = {"cuda": 8192, "cpu": 2048}


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, processor and device as plain values."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"stem-attn": __version__} | {name: _version(name) for name in _PACKAGES if _version(name)},
        "torch_build": torch.__version__,
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
    else:
        found |= {
            "device": device.type,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return found


def limit(device: torch.device, dtype: torch.dtype) -> tuple[str, Run, int]:
    """Prepare the machine's limit: a square matrix product on random data, in float32 on a CPU.

    Returns:
        Its description, the call, and its floating-point operations.
    """
    n = _LIMIT_SIZE["cuda" if device.type == "cuda" else "cpu"]
    kind = dtype if device.type == "cuda" else torch.float32
    gen = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=gen, dtype=kind, device=device) for _ in range(2))
    out = torch.empty_like(a)
    run: Callable[[], Tensor] = lambda: torch.mm(a, b, out=out)  # noqa: E731
    return f"{str(kind).removeprefix('torch.')} matmul {n}x{n}x{n}", run, 2 * n**3


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        pynvml: Any = importlib.import_module("pynvml")

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # not installed, or no permission
        return None
