"""The Hopper kernel has no interpreter: without a GPU, compile it for one, and read what the assembler reports."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", minversion="3.6")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_BYTES = 227 << 10  # what a Hopper program may take


def compile_kernel(head_dim: int, v_head_dim: int, window: bool, page_size: int) -> Any:
    """Compile for compute capability 9.0, with the tile that such head dims get."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from stem_attn.backends.triton.hopper_kernel import box_layout, box_shape, hopper_attention_kernel
    from stem_attn.backends.triton.tiles import choose_hopper_tile

    tile = choose_hopper_tile(head_dim, v_head_dim)
    names = hopper_attention_kernel.arg_names
    boxes = {"q": (64, head_dim)}
    boxes |= {n: box_shape(tile.keys, dim, page_size) for n, dim in (("k", head_dim), ("v", v_head_dim))}
    constants = {"DV": v_head_dim, "DV_PAD": v_head_dim, "KEYS": tile.keys, "PAGE": page_size, "STAGES": tile.stages}
    constants |= {"WINDOW": window, "LSE": True}
    types: dict[str, Any] = {"out": "*bf16", "lse": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("indices", "counts", "block_table"), "*i32")
    types |= {n: f"tensordesc<bf16[1, 1, {t}, {d}],{box_layout((t, d))!r}>" for n, (t, d) in boxes.items()}
    types |= {"out_strides": ("i32",) * 4, "index_strides": ("i32",) * 4, "count_strides": ("i32",) * 3}
    types |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(
        fn=hopper_attention_kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("head_dim", "window", "page_size"), [(128, 0, 0), (256, 1, 0), (128, 0, 16), (256, 0, 16), (128, 0, 128)]
)
def test_no_registers_spill(head_dim: int, window: int, page_size: int, tmp_path: Path) -> None:
    """Compiled in a process of its own, where Triton is not in its interpreter."""
    binary = tmp_path / "kernel.cubin"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, __file__, str(head_dim), str(window), str(page_size), binary],
        env=env,
        check=True,
        timeout=120,
    )
    report = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"STACK:(\d+).*LOCAL:(\d+)", report)
    assert usage is not None, report
    assert usage.groups() == ("0", "0"), report


if __name__ == "__main__":
    made = compile_kernel(int(sys.argv[1]), int(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3]))
    assert made.metadata.shared <= SHARED_BYTES
    assert "wgmma.mma_async" in made.asm["ptx"]
    Path(sys.argv[4]).write_bytes(made.asm["cubin"])
