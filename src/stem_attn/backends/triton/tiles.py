"""Which tile, warps and pipeline depth the attention kernel gets: a table, kept apart from the kernel.

The entries were measured (docs/log.md) or follow from the shared memory and registers that a tile takes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch choices of the attention kernel.

    Args:
        keys: Key tokens a step; divides the block.
        warps: Warps a program.
        stages: Depth of the load pipeline.
        registers: Cap a thread, or None; a cap lets two programs share a multiprocessor.
    """

    keys: int
    warps: int
    stages: int
    registers: int | None = None


def choose_tile(*, block_size: int, head_dim: int, item_bytes: int, hopper: bool) -> Tile:
    """Pick the launch choices.

    Args:
        block_size: Tokens a block, a power of two from 16 to 128.
        head_dim: The larger of q's and v's head dim, padded to a power of two.
        item_bytes: Bytes a number.
        hopper: Whether the device has Hopper's asynchronous matrix products and 227 KiB of shared memory.
    """
    warps = max(1, block_size // 16)
    if item_bytes > 2:
        return Tile(min(block_size, 32), min(warps, 4), 1)
    if head_dim > 128:
        return Tile(min(block_size, 64 if hopper else 32), warps, 2)
    return Tile(min(block_size, 64), warps, 2 if head_dim == 128 else 3)
