"""Which tile, warps and pipeline depth the attention kernels get: a table, kept apart from the kernels.

The entries were measured (docs/log.md) or follow from the shared memory and registers that a tile takes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch choices of the portable kernel.

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


def choose_tile(*, block_size: int, head_dim: int, item_bytes: int, tma: bool) -> Tile:
    """Pick the launch choices.

    Args:
        block_size: Tokens a block, a power of two from 16 to 128.
        head_dim: The larger of q's and v's head dim, padded to a power of two.
        item_bytes: Bytes a number.
        tma: Whether tiles come by descriptor; such GPUs have 227 KiB of shared memory, others may have only 99.
    """
    warps = max(1, block_size // 16)
    keys = min(block_size, 64)
    if item_bytes > 2:
        return Tile(min(block_size, 32), min(warps, 4), 1)
    if head_dim > 128:
        return Tile(keys, warps, 2) if tma else Tile(min(block_size, 32), warps, 1)
    if head_dim == 128 and block_size == 128:
        return Tile(keys, warps, 2, 128 if tma else None)
    return Tile(keys, warps, 3 if tma or head_dim < 128 else 2)


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Launch choices of the Hopper kernel.

    Args:
        keys: Key tokens a step; divides the block of 128.
        stages: Tiles that each of the key and value rings holds.
    """

    keys: int
    stages: int


def choose_hopper_tile(head_dim: int, v_head_dim: int) -> HopperTile:
    """Pick the launch choices, from the head dims padded to powers of two, 64 to 256.

    The accumulators take `v_head_dim / 2` registers a thread and the scores `keys / 2`; the rings and the queries
    share 227 KiB.
    """
    return HopperTile(128 if max(head_dim, v_head_dim) <= 128 else 64, 2)
