"""The Hopper kernel has no interpreter: without a GPU, compile it for one, and read what the assembler reports."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compiling import assert_no_spills, compile_for_hopper, cuobjdump, run_alone

pytest.importorskip("triton", minversion="3.6")
SHARED_BYTES = 227 << 10  # what a Hopper program may take


def compile_kernel(
    block: int,
    head_dim: int,
    v_head_dim: int,
    window: bool,
    page_size: int,
    sinks: bool,
    tanh: str,
    may_skip: bool,
    residual: bool,
) -> Any:
    """Compile for compute capability 9.0, with the tile that such head dims get."""
    from stem_attn.backends.triton.hopper_kernel import box_layout, box_shape, hopper_attention_kernel
    from stem_attn.backends.triton.tiles import choose_hopper_tile

    tile = choose_hopper_tile(block, head_dim, v_head_dim)
    boxes = {"q": (64, head_dim)}
    boxes |= {n: box_shape(tile.keys, dim, page_size) for n, dim in (("k", head_dim), ("v", v_head_dim))}
    constants = {"DV": v_head_dim, "DV_PAD": v_head_dim, "KEYS": tile.keys, "PAGE": page_size, "STAGES": tile.stages}
    constants |= {"WINDOW": window, "LSE": True, "SINKS": sinks, "TANH": tanh, "BLOCK": block}
    constants["MAY_SKIP"] = may_skip
    dtype = "fp16" if tanh == "short" else "bf16"
    types: dict[str, Any] = {"out": f"*{dtype}", "lse": "*fp32", "sinks": "*bf16"}
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    types |= dict.fromkeys(("indices", "counts", "block_table"), "*i32")
    types |= {n: f"tensordesc<{dtype}[1, 1, {t}, {d}],{box_layout((t, d))!r}>" for n, (t, d) in boxes.items()}
    types["out_strides"] = ("i32",) * 4
    if residual:
        means = {"k_means": (tile.keys, head_dim), "v_means": (tile.keys, v_head_dim)}
        types |= {n: f"tensordesc<{dtype}[1, 1, {t}, {d}],{box_layout((t, d))!r}>" for n, (t, d) in means.items()}
        types["kept"] = "*i32"
    else:
        constants |= dict.fromkeys(("k_means", "v_means", "kept"))
    return compile_for_hopper(hopper_attention_kernel, types, constants, num_warps=4, maxnreg=tile.registers)


def assert_products_run_beside_exponentials(binary: Path, consumers: int, exponentials: int) -> None:
    """Read off that a tile's exponentials stand between the wait for its scores and the wait for the value product.

    The assembler may move the second wait up to the first. The value product then has the tensor cores to itself.
    """
    code = subprocess.run([cuobjdump(), "-sass", binary], capture_output=True, text=True, check=True).stdout
    loops = re.findall(r"DEPBAR.LE gsb0, 0x1(.*?)DEPBAR.LE gsb0, 0x0", code, re.DOTALL)
    assert len(loops) == consumers
    assert all(loop.count("MUFU.EX2") >= exponentials for loop in loops)


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("block", "head_dim", "v_head_dim", "window", "page_size", "sinks", "tanh", "may_skip", "residual"),
    [
        (128, 128, 128, 0, 0, 0, "none", 0, 0),
        (128, 256, 256, 1, 0, 0, "none", 0, 0),
        (128, 128, 128, 0, 16, 0, "none", 0, 0),
        (128, 256, 256, 0, 16, 0, "none", 0, 0),
        (128, 128, 128, 0, 128, 0, "none", 0, 0),
        (128, 64, 64, 1, 0, 1, "none", 0, 0),
        (128, 256, 256, 1, 16, 1, "fast", 0, 0),
        (128, 128, 128, 1, 0, 1, "short", 0, 0),
        (128, 128, 256, 0, 0, 0, "none", 0, 0),
        (64, 128, 128, 0, 0, 0, "none", 0, 0),
        (64, 128, 128, 1, 16, 1, "fast", 0, 0),
        (128, 128, 128, 0, 0, 0, "none", 1, 0),
        (64, 128, 128, 1, 16, 1, "fast", 1, 0),
        (128, 128, 128, 0, 0, 0, "none", 0, 1),
        (128, 128, 128, 0, 16, 1, "fast", 0, 1),
        (128, 64, 128, 0, 0, 0, "short", 0, 1),
        (64, 128, 128, 0, 0, 0, "none", 0, 1),
        (64, 128, 128, 0, 16, 1, "fast", 0, 1),
    ],
)
def test_no_registers_spill(
    block: int,
    head_dim: int,
    v_head_dim: int,
    window: int,
    page_size: int,
    sinks: int,
    tanh: str,
    may_skip: int,
    residual: int,
    tmp_path: Path,
) -> None:
    binary = tmp_path / "kernel.cubin"
    run_alone(__file__, block, head_dim, v_head_dim, window, page_size, sinks, tanh, may_skip, residual, binary)
    # With everything at once two addresses wait outside the loop for the end.
    assert_no_spills(binary, 16 if residual and page_size and sinks and block == 128 else 0)
    assert_products_run_beside_exponentials(binary, block // 64, 64 if block == 128 and v_head_dim <= 128 else 32)


if __name__ == "__main__":
    block, head_dim, v_head_dim, window, page_size, sinks = map(int, sys.argv[1:7])
    tanh, may_skip, residual, binary = sys.argv[7:]
    flags = window == 1, page_size, sinks == 1, tanh, may_skip == "1", residual == "1"
    made = compile_kernel(block, head_dim, v_head_dim, *flags)
    assert made.metadata.shared <= SHARED_BYTES
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert ("tanh.approx" in made.asm["ptx"]) == (tanh == "fast")
    Path(binary).write_bytes(made.asm["cubin"])
