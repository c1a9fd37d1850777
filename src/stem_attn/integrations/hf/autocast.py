"""Autocast: the tensors of a call, cast as SDPA casts them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def cast_like_sdpa(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to autocast's dtype where autocast is on. Rotary embeddings make float32 of some, caches do not."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def autocast_off(device: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off inside a `with` block: block scores are float32 on purpose, and outputs are allocated."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
