"""The machine's own limit: what a large matrix product reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stem_attn.lab.timing import Work

_SIZE = {"cuda": 8192, "cpu": 2048}


def limit(device: torch.device, dtype: torch.dtype) -> tuple[str, Work, int]:
    """Prepare the machine's limit: a square matrix product on random data, in float32 on a CPU.

    Returns:
        Its description, the call, and its floating-point operations.
    """
    n = _SIZE["cuda" if device.type == "cuda" else "cpu"]
    kind = dtype if device.type == "cuda" else torch.float32
    gen = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=gen, dtype=kind, device=device) for _ in range(2))
    out = torch.empty_like(a)
    run: Callable[[], Tensor] = lambda: torch.mm(a, b, out=out)  # noqa: E731
    return f"{str(kind).removeprefix('torch.')} matmul {n}x{n}x{n}", run, 2 * n**3
