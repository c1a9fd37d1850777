"""The Hopper kernel has no interpreter: without a GPU, compile it for one, and read what the assembler reports."""

import sys
from pathlib import Path
from typing import Any

import pytest

from compiling import assert_no_spills, compile_for_hopper, cuobjdump, run_alone

pytest.importorskip("triton", minversion="3.6")
SHARED_BYTES = 227 << 10  # what a Hopper program may take


def compile_kernel(head_dim: int, v_head_dim: int, window: bool, page_size: int, sinks: bool, tanh: str) -> Any:
    """Compile for compute capability 9.0, with the tile that such head dims get."""
    from stem_attn.backends.triton.hopper_kernel import box_layout, box_shape, hopper_attention_kernel
    from stem_attn.backends.triton.tiles import choose_hopper_tile

    tile = choose_hopper_tile(head_dim, v_head_dim)
    boxes = {"q": (64, head_dim)}
    boxes |= {n: box_shape(tile.keys, dim, page_size) for n, dim in (("k", head_dim), ("v", v_head_dim))}
    constants = {"DV": v_head_dim, "DV_PAD": v_head_dim, "KEYS": tile.keys, "PAGE": page_size, "STAGES": tile.stages}
    constants |= {"WINDOW": window, "LSE": True, "SINKS": sinks, "TANH": tanh}
    dtype = "fp16" if tanh == "short" else "bf16"
    types: dict[str, Any] = {"out": f"*{dtype}", "lse": "*fp32", "sinks": "*bf16"}
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    types |= dict.fromkeys(("indices", "counts", "block_table"), "*i32")
    types |= {n: f"tensordesc<{dtype}[1, 1, {t}, {d}],{box_layout((t, d))!r}>" for n, (t, d) in boxes.items()}
    types["out_strides"] = ("i32",) * 4
    return compile_for_hopper(hopper_attention_kernel, types, constants, num_warps=4, maxnreg=168)


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("head_dim", "window", "page_size", "sinks", "tanh"),
    [
        (128, 0, 0, 0, "none"),
        (256, 1, 0, 0, "none"),
        (128, 0, 16, 0, "none"),
        (256, 0, 16, 0, "none"),
        (128, 0, 128, 0, "none"),
        (64, 1, 0, 1, "none"),
        (256, 1, 16, 1, "fast"),
        (128, 1, 0, 1, "short"),
    ],
)
def test_no_registers_spill(head_dim: int, window: int, page_size: int, sinks: int, tanh: str, tmp_path: Path) -> None:
    binary = tmp_path / "kernel.cubin"
    run_alone(__file__, head_dim, window, page_size, sinks, tanh, binary)
    assert_no_spills(binary)


if __name__ == "__main__":
    head_dim, window, page_size, sinks = map(int, sys.argv[1:5])
    tanh, binary = sys.argv[5:]
    made = compile_kernel(head_dim, head_dim, window == 1, page_size, sinks == 1, tanh)
    assert made.metadata.shared <= SHARED_BYTES
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert ("tanh.approx" in made.asm["ptx"]) == (tanh == "fast")
    Path(binary).write_bytes(made.asm["cubin"])
