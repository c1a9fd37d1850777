"""Numbers that the host has worked out, on their way to the device: nobody waits, and captured graphs may replay it."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_attn.backends.triton.launch import is_captured

ARENA_NUMBERS = 1 << 18
"""Numbers in a piece of page-locked memory: 1 MiB."""

# The piece that numbers are put into, and how many of its places are taken.
_arena: list[tuple[Tensor, int]] = []

# What captured graphs copy from at every replay, by its numbers: it must outlive the graphs.
_captured: dict[tuple[int, ...], Tensor] = {}


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy int32 numbers to a device, on its current stream."""
    if is_captured(device):
        numbers = kept_for_graphs(numbers)
    return numbers.to(device, non_blocking=True)


def kept_for_graphs(numbers: Tensor) -> Tensor:
    """Return int32 numbers in page-locked memory that is never given back: the same for equal ones."""
    key = tuple(numbers.tolist())
    found = _captured.get(key)
    return _captured.setdefault(key, page_locked(numbers)) if found is None else found


def page_locked(numbers: Tensor) -> Tensor:
    """Copy int32 numbers to page-locked memory, of which much is taken at once: the driver may wait for the device."""
    count = -(-numbers.numel() // 4) * 4  # 16 bytes
    try:
        piece, taken = _arena.pop()
    except IndexError:  # there is none yet, or another thread has it
        piece, taken = numbers[:0], 0
    with torch.inference_mode(False):  # what is made in inference mode nobody could write to outside of it
        if taken + count > piece.numel():
            size = max(ARENA_NUMBERS, count)
            piece, taken = torch.empty(size, dtype=numbers.dtype, device="cpu", pin_memory=True), 0
        _arena.append((piece, taken + count))
        return piece[taken : taken + numbers.numel()].view(numbers.shape).copy_(numbers)
