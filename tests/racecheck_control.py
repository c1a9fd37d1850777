"""A ring of two tiles that is right by construction, and one that is not, for compute-sanitizer's racecheck.

    compute-sanitizer --tool racecheck python tests/racecheck_control.py [broken]

A warp copies tiles by the copy engine, two warpgroups read them, and mbarriers order both, as in the Hopper kernels.
What racecheck reports of the right one, it reports of any such kernel. The broken one frees a tile before it is read.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stem_attn.backends.triton.hopper_kernel import load_box

TILE = gl.constexpr(64)  # tokens and dims
STAGES = gl.constexpr(2)
STEPS = 9


@gluon.jit
def control_kernel(x, out, steps, broken: gl.constexpr):
    """Add up the tiles of x [steps * TILE, TILE] twice: out, float32 [2, TILE, TILE]."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE], x.dtype)
    tiles = gl.allocate_shared_memory(x.dtype, [STAGES, TILE, TILE], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    ring = (tiles, full, free)
    gl.warp_specialize(
        [
            (_read, (0, ring, out, steps, broken)),
            (_read, (1, ring, out, steps, broken)),
            (_copy, (x, ring, steps)),
        ],
        [4, 1],
        [128, 24],
    )


@gluon.jit
def _copy(x, ring, steps):
    tiles, full, free = ring
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(slot), x.block_type.nbytes)
        load_box(x, [step * TILE, 0], full.index(slot), tiles.index(slot))


@gluon.jit
def _read(part: gl.constexpr, ring, out, steps, broken: gl.constexpr):
    tiles, full, free = ring
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    total = gl.zeros([TILE, TILE], gl.float32, layout)
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        if broken:
            mbarrier.arrive(free.index(slot), count=1)
        total += tiles.index(slot).load(layout).to(gl.float32)
        if not broken:
            mbarrier.arrive(free.index(slot), count=1)
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    gl.store(out + part * TILE * TILE + rows[:, None] * TILE + columns[None, :], total)


def main() -> None:
    """Run one of the two, and say how far its sums are from the right ones."""
    size, broken = TILE.value, sys.argv[1:] == ["broken"]
    x = torch.randn(STEPS * size, size, device="cuda").bfloat16()
    out = torch.empty(2, size, size, device="cuda")
    layout = gl.NVMMASharedLayout.get_default_for([size, size], gl.bfloat16)
    control_kernel[(1,)](TensorDescriptor.from_tensor(x, [size, size], layout), out, STEPS, broken, num_warps=4)
    error = (out - x.float().view(STEPS, size, size).sum(0)).abs().max().item()
    print("broken" if broken else "right", "ring, largest error", error)


if __name__ == "__main__":
    main()
