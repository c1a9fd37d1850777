"""How tensors lie in memory, and what of it the kernels can address."""

from __future__ import annotations

import torch
from torch import Tensor

Layouts = tuple[tuple[torch.Size, tuple[int, ...]], ...]
"""Shapes and strides of a launch's tensors."""


def layouts_of(*tensors: Tensor) -> Layouts:
    """Return shapes and strides."""
    return tuple((x.shape, x.stride()) for x in tensors)


def alignment_of(*tensors: Tensor) -> tuple[bool, ...]:
    """Say which tensors start at a multiple of 16 bytes: kernels are compiled for it."""
    return tuple(x.data_ptr() % 16 == 0 for x in tensors)


def padded(head_dim: int) -> int:
    """Round a head dim up to a power of two that a matrix product can take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def unit_stride(x: Tensor) -> Tensor:
    """Return a tensor, or a copy, whose last stride is 1."""
    return x if x.stride(3) == 1 else x.contiguous()


def describable(x: Tensor) -> bool:
    """Tell whether the copy engine can address a tensor: 16-byte aligned base and strides."""
    aligned = 16 // x.element_size()
    strides, shape = x.stride(), x.shape
    return x.data_ptr() % 16 == 0 and all(
        shape[i] == 1 or (strides[i] > 0 and strides[i] % aligned == 0) for i in range(3)
    )


def described(x: Tensor, tokens: int, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Return shape, strides and tile of a descriptor for [1, 1, tokens, dims]; outside the tensor it reads zeros."""
    aligned = 16 // x.element_size()
    strides = [s if n > 1 else aligned for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return list(x.shape), [*strides, 1], [1, 1, tokens, dims]
