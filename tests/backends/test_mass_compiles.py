"""The mass kernels for a Hopper GPU, without one: registers hold their numbers, shared memory their tiles."""

import sys
from pathlib import Path
from typing import Any

import pytest

from compiling import assert_no_spills, compile_for_hopper, cuobjdump, run_alone

pytest.importorskip("triton", minversion="3.6")
SHARED_BYTES = {"portable": 99 << 10, "hopper": 227 << 10}  # what a program may take on GPUs that have the least


def compile_kernel(which: str, head_dim: int, spread: bool, stride: int, tanh: str) -> Any:
    """Compile for compute capability 9.0, blocks of 128 and 16-bit inputs, with the tile that these get."""
    import torch

    from stem_attn.backends.triton.hopper_mass_kernel import box_layout, hopper_mass_kernel
    from stem_attn.backends.triton.mass_kernels import mass_kernel
    from stem_attn.backends.triton.tiles import choose_hopper_mass_tile, choose_mass_tile

    depth = head_dim * 3 // 2 if spread else head_dim
    constants = {"BLOCK": 128, "STRIDE": stride, "Q_STRIDE": 2 * stride, "DEPTH": depth, "TANH": tanh}
    constants |= {"VALUES": True, "SINKS": tanh != "none", "CHAINED": True}
    types = dict.fromkeys(("table", "sinks", "masses", "scores"), "*fp32")
    types |= dict.fromkeys(("factor", "cap_log2"), "fp32")
    if which == "hopper":
        tile = choose_hopper_mass_tile(-(-depth // 64), 128 // stride)
        assert tile is not None
        for name, rows in (("queries", 64), ("keys", tile.columns)):
            types[name] = f"tensordesc<fp16[{rows}, 64],{box_layout(rows)!r}>"
        constants |= {"COLUMNS": tile.columns, "STAGES": tile.stages}
        return compile_for_hopper(hopper_mass_kernel, types, constants, num_warps=4, maxnreg=168)
    rows, columns, warps, stages = choose_mass_tile(depth, 128 // stride, 64 // stride, torch.float16.itemsize)
    constants |= {"STEP": 64, "ROWS": rows, "COLUMNS": columns, "CHUNK": 4 * warps, "CUDA": True}
    types |= {"queries": f"tensordesc<fp16[{rows}, 64]>", "keys": f"tensordesc<fp16[{columns}, 64]>"}
    return compile_for_hopper(mass_kernel, types, constants, num_warps=warps, num_stages=stages)


# The Hopper kernel's other tiles leave registers free; this one, the fastest, keeps two numbers on the stack.
STACK_BYTES = {"portable": 0, "hopper": 8}
PORTABLE = [(128, 1, 8, "none"), (128, 0, 16, "none"), (256, 1, 8, "none"), (128, 1, 8, "fast"), (256, 1, 8, "exact")]
HOPPER = [(128, 1, 8, "none"), (128, 0, 8, "none"), (64, 1, 8, "none"), (128, 1, 8, "fast")]


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("which", "head_dim", "spread", "stride", "tanh"),
    [("portable", *case) for case in PORTABLE] + [("hopper", *case) for case in HOPPER],
)
def test_registers_hold_it(which: str, head_dim: int, spread: int, stride: int, tanh: str, tmp_path: Path) -> None:
    binary = tmp_path / "kernel.cubin"
    run_alone(__file__, which, head_dim, spread, stride, tanh, binary)
    assert_no_spills(binary, STACK_BYTES[which])


if __name__ == "__main__":
    which = sys.argv[1]
    made = compile_kernel(which, int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]), sys.argv[5])
    assert made.metadata.shared <= SHARED_BYTES[which]
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "max.NaN.f32" in made.asm["ptx"]  # between products and their sum, see `unfused`
    Path(sys.argv[6]).write_bytes(made.asm["cubin"])
