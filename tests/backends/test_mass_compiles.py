"""The mass kernel for a Hopper GPU, without one: no register spills, and it fits any GPU's shared memory."""

import sys
from pathlib import Path
from typing import Any

import pytest

from compiling import assert_no_spills, compile_for_hopper, cuobjdump, run_alone

pytest.importorskip("triton", minversion="3.6")
SHARED_BYTES = 99 << 10  # what a program may take on GPUs that have the least


def compile_kernel(head_dim: int, spread: bool, stride: int, tanh: str) -> Any:
    """Compile for compute capability 9.0, blocks of 128 and 16-bit inputs, with the tile that these get."""
    import torch

    from stem_attn.backends.triton.mass_kernels import mass_kernel
    from stem_attn.backends.triton.tiles import choose_mass_tile

    depth, step = head_dim * 3 // 2 if spread else head_dim, 64
    rows, columns, warps, stages = choose_mass_tile(depth, 128 // stride, torch.float16.itemsize)
    constants = {"BLOCK": 128, "STRIDE": stride, "Q_STRIDE": 2 * stride, "DEPTH": depth, "STEP": step}
    constants |= {"ROWS": rows, "COLUMNS": columns, "TANH": tanh, "CUDA": True}
    types = {"queries": f"tensordesc<fp16[{rows}, {step}]>", "keys": f"tensordesc<fp16[{columns}, {step}]>"}
    types |= {"table": "*fp32", "masses": "*fp32", "totals": "*fp32"}
    types |= dict.fromkeys(("factor", "cap_log2"), "fp32")
    return compile_for_hopper(mass_kernel, types, constants, num_warps=warps, num_stages=stages)


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("head_dim", "spread", "stride", "tanh"),
    [(128, 1, 8, "none"), (128, 0, 16, "none"), (256, 1, 8, "none"), (128, 1, 8, "fast"), (256, 1, 8, "exact")],
)
def test_no_registers_spill(head_dim: int, spread: int, stride: int, tanh: str, tmp_path: Path) -> None:
    binary = tmp_path / "kernel.cubin"
    run_alone(__file__, head_dim, spread, stride, tanh, binary)
    assert_no_spills(binary)


if __name__ == "__main__":
    made = compile_kernel(int(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3]), sys.argv[4])
    assert made.metadata.shared <= SHARED_BYTES
    assert "wgmma.mma_async" in made.asm["ptx"]
    Path(sys.argv[5]).write_bytes(made.asm["cubin"])
