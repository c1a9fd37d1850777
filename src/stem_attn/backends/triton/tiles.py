"""Which tile, warps and pipeline depth the kernels get: a table, kept apart from them.

The entries were measured (docs/log.md) or follow from what a tile takes: shared memory, registers, the compiler's time.
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
    if item_bytes > 2:  # products without tensor cores are unrolled: larger tiles a warp take minutes to compile
        return Tile(16, warps, 1)
    if head_dim > 128:
        return Tile(keys, warps, 2) if tma else Tile(min(block_size, 32), warps, 1)
    if head_dim == 128 and block_size == 128:
        return Tile(keys, warps, 2, 128 if tma else None)
    return Tile(keys, warps, 3 if tma or head_dim < 128 else 2)


def choose_exact_rows_tile(*, block_size: int, head_dim: int, item_bytes: int) -> Tile:
    """Pick the launch choices of the kernel that attends exactly for an audit; arguments as in `choose_tile`.

    All fit into the 64 KiB of shared memory that every GPU has.
    """
    if item_bytes > 2:
        return Tile(16, 4, 1)
    return Tile(min(block_size, 64), 4, 2 if head_dim <= 128 else 1)


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Launch choices of the Hopper kernels.

    Args:
        keys: Key tokens a step; divides the block.
        stages: Tiles that each of the key and value rings holds.
        registers: A thread, as they are dealt out at first.
    """

    keys: int
    stages: int
    registers: int


def choose_hopper_tile(block_size: int, head_dim: int, v_head_dim: int) -> HopperTile:
    """Pick the launch choices, from the head dims padded to powers of two, 64 to 256; blocks of 64 have 128.

    The accumulators take `v_head_dim / 2` registers a thread and the scores `keys / 2`; the rings and the queries
    share 227 KiB. Of blocks of 64 two programs of 256 threads share a multiprocessor, of others one of 384 has it.
    """
    if block_size == 64:
        return HopperTile(64, 3, 128)
    return HopperTile(128 if max(head_dim, v_head_dim) <= 128 else 64, 2, 168)


def choose_fp8_tile(block_size: int, head_dim: int, v_head_dim: int) -> HopperTile:
    """Pick the launch choices of the Hopper kernel with 8-bit products; arguments as in `choose_hopper_tile`.

    A program has as many queries as a tile has keys. With 64 of them two programs share a multiprocessor. Blocks of
    128 have two such programs where 256 value dims leave no registers for the scores of 128 keys. With a third
    tile in their rings they are slower: it would leave no cache for what registers do not hold.
    """
    if block_size == 128 and v_head_dim <= 128:
        return HopperTile(128, 2, 168)
    return HopperTile(64, 4 if max(head_dim, v_head_dim) <= 128 else 2, 128)


def choose_mass_tile(depth: int, slots: int, q_slots: int, item_bytes: int) -> tuple[int, int, int, int]:
    """Pick rows, columns, warps and stages of a mass tile.

    Rows take at most half of any GPU's shared memory (96 KiB), and two tiles of columns the rest. Tiles of 128 x 64
    leave the registers for two programs a multiprocessor. A tile writes at most 16 key blocks, for their masses move
    through shared memory too.
    """
    row_bytes = depth * item_bytes
    rows = max(min(128, 1 << (49152 // row_bytes).bit_length() - 1), q_slots)
    columns = min(64, 1 << (max(98304 // row_bytes - rows, 16) // 2).bit_length() - 1, 16 * slots)
    return rows, columns, 8 if rows == 128 else 4, 2


@dataclass(frozen=True, slots=True)
class HopperMassTile:
    """Launch choices of the Hopper kernel of the mass score.

    Args:
        columns: Key runs a step.
        stages: Steps that the ring of key runs holds.
    """

    columns: int
    stages: int


def choose_hopper_mass_tile(boxes: int, slots: int) -> HopperMassTile | None:
    """Pick the launch choices, from the boxes of 64 numbers that a run takes and the key runs of a block.

    None: the portable kernel takes what this one has not been measured on. Query runs take 16 registers a thread for a
    box, beside 128 for two steps' logits.
    """
    return HopperMassTile(128, 2) if boxes <= 3 and slots == 16 else None


def choose_score_tile(heads: int, rows: int, columns: int, item_bytes: int) -> tuple[int, int, int, int]:
    """Pick rows, columns, warps and stages of a score tile: large ones read less, small ones fill the device."""
    if item_bytes > 2:
        return 64, 64, 4, 2
    if heads * -(-rows // 128) * -(-columns // 128) >= 512:
        return 128, 128, 4, 3
    return 64, 64, 4, 4
