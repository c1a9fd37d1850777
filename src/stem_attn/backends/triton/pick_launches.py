"""The launches that keep the best blocks of scored rows."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from stem_attn.backends.triton.choose_kernel import choose_kernel
from stem_attn.backends.triton.devices import SUMS_TAKE_SHARED_MEMORY
from stem_attn.backends.triton.launch import Launch
from stem_attn.backends.triton.selection_kernels import top_kernel
from stem_attn.backends.triton.selection_sizes import Sizes, Steps
from stem_attn.backends.triton.share_kernel import share_kernel

# Measured on an H100 (docs/log.md): 512 keys a warp select 5% slower, 128 take 1.7x as long.
TOP_KEYS_PER_WARP = 1024
# Keys of all heads that `share_kernel` looks at together: 16 a thread.
SHARE_KEYS = 4096
# Keys of all heads of a row that `choose_kernel` holds in registers: up to 32 a thread, 4 where few are enough. Where
# they pass through shared memory, as many as every GPU has room for.
CHOOSE_KEYS = 8192 if SUMS_TAKE_SHARED_MEMORY else 32768
CHOOSE_KEYS_PER_WARP = 128
FEWEST_COLUMNS = 256


def pick_launches(sizes: Sizes, first: int, rows: int) -> Steps:
    """Plan what heads keep of `rows` query blocks from `first` on."""
    inside = sizes.config.forced_blocks == "inside"
    names = ("scores", "keep", "indices", "counts", "keep_stride", "width")
    alone = _take_top(sizes, first, rows, inside, shared=False), names
    if not sizes.scope:
        return [alone]
    heads = triton.next_power_of_2(sizes.rivals)
    if heads * triton.next_power_of_2(sizes.pitch) <= CHOOSE_KEYS:
        all_names = ("scores", "keep", "indices", "counts", "keep_stride", "least_at", "width")
        shared: Steps = [(choose, all_names) for choose in _choose(sizes, first, rows, inside, heads)]
    else:
        share = _share(sizes, first, rows, inside, heads), ("scores", "keep", "counts", "keep_stride", "least_at")
        shared = [share, (_take_top(sizes, first, rows, True, shared=True), names)]
    # How many blocks a head keeps alone depends on its scores where forced ones come on top.
    return shared if inside else [alone, *shared]


def _choose(sizes: Sizes, first: int, rows: int, inside: bool, heads: int) -> Iterator[Launch]:
    """Plan a launch for every power of two of blocks that rows see, from FEWEST_COLUMNS on."""
    most = triton.next_power_of_2(sizes.pitch)
    done = 0
    while done < rows:
        seen = sizes.grid.first_block + first + done + 1  # blocks, of the first row that is left
        columns = min(max(triton.next_power_of_2(seen), FEWEST_COLUMNS), most)
        here = min(rows - done, columns - seen + 1)
        inner = min(columns, 128)
        constants = {"HEADS": heads, "OUTER": columns // inner, "INNER": inner, "INSIDE": inside}
        constants |= {"NORMALISE": not sizes.mass, "CUDA": sizes.cuda, "CHAINED": sizes.chained}
        options = {"num_warps": min(max(heads * columns // CHOOSE_KEYS_PER_WARP, 4), 32)}
        grid, numbers = _competition(sizes, first, here)
        numbers = (first, rows, done, *numbers[1:])
        yield Launch(choose_kernel, grid, numbers, constants, **sizes.chain(options))
        done += here


def _share(sizes: Sizes, first: int, rows: int, inside: bool, heads: int) -> Launch:
    chunk = max(min(SHARE_KEYS // heads, triton.next_power_of_2(sizes.pitch)), 16)
    constants = {"HEADS": heads, "CHUNK": chunk, "INSIDE": inside, "NORMALISE": not sizes.mass}
    return Launch(share_kernel, *_competition(sizes, first, rows), constants, num_warps=8)


def _competition(sizes: Sizes, first: int, rows: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return grid and numbers of kernels in which a program sees all heads that compete."""
    grid, config = sizes.grid, sizes.config
    numbers = (
        first,
        sizes.group,
        sizes.kv_heads,
        sizes.scope,
        grid.q_blocks,
        grid.first_block,
        sizes.pitch,
        config.sink_blocks,
        config.local_blocks,
    )
    return (rows, sizes.all_heads // sizes.scope), numbers


def _take_top(sizes: Sizes, first: int, rows: int, inside: bool, *, shared: bool) -> Launch:
    grid, config = sizes.grid, sizes.config
    columns = triton.next_power_of_2(sizes.pitch)
    return Launch(
        top_kernel,
        (rows * sizes.group, sizes.all_heads),
        (
            first,
            sizes.group,
            grid.q_blocks,
            grid.first_block,
            sizes.pitch,
            config.sink_blocks,
            config.local_blocks,
            sizes.kv_heads,
        ),
        {"COLUMNS": columns, "INSIDE": inside, "SHARED": shared},
        num_warps=min(max(columns // TOP_KEYS_PER_WARP, 1), 16),
    )
