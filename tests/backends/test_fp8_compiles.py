"""The kernels with 8-bit products for a Hopper GPU, compiled without one; what the assembler makes of them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compiling import assert_no_spills, compile_for_hopper, cuobjdump, run_alone
from stem_attn.backends.triton.tiles import choose_fp8_tile

pytest.importorskip("triton", minversion="3.6")
SHARED_BYTES = 227 << 10  # what a Hopper program may take
HALF_OF_SHARED_BYTES = 113 << 10  # so that two share a multiprocessor


def compile_attention(
    block_size: int, head_dim: int, v_head_dim: int, window: bool, lse: bool, sinks: bool, tanh: str
) -> Any:
    """Compile the attention kernel for compute capability 9.0."""
    from stem_attn.backends.triton.hopper_fp8_kernel import box_layout, hopper_fp8_kernel

    tile = choose_fp8_tile(block_size, head_dim, v_head_dim)
    boxes = {"q": (64, head_dim), "k": (tile.keys, head_dim), "v": (v_head_dim, tile.keys)}
    constants = {"DV": v_head_dim, "STAGES": tile.stages, "WINDOW": window, "LSE": lse, "SINKS": sinks, "TANH": tanh}
    constants["BLOCK"] = block_size
    types: dict[str, Any] = {"out": "*bf16", "sinks": "*bf16", "out_strides": ("i32",) * 4}
    types |= dict.fromkeys(("lse", "q_scales", "kv_scales", "shifts"), "*fp32")
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    types |= dict.fromkeys(("indices", "counts", "unsafe"), "*i32")
    types |= {n: f"tensordesc<fp8e4nv[1, 1, {t}, {d}],{box_layout(t, d)!r}>" for n, (t, d) in boxes.items()}
    return compile_for_hopper(hopper_fp8_kernel, types, constants, num_warps=4, maxnreg=tile.registers)


def compile_rounding(head_dim: int, page_size: int) -> Any:
    """Compile the kernel that rounds q, k and v."""
    from stem_attn.backends.triton.quantize_kernels import quantize_kernel

    constants = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD", "DIMS"), head_dim)
    constants |= {"BLOCK": 128, "TOKENS": 64 if head_dim <= 128 else 32, "SHIFTS": True, "PAGE": page_size}
    types: dict[str, Any] = dict.fromkeys(("q", "k", "v"), "*bf16") | dict.fromkeys(("q8", "k8", "v8"), "*fp8e4nv")
    types |= dict.fromkeys(("means", "scales", "q_scales", "shifts"), "*fp32")
    types |= dict.fromkeys(("unsafe", "block_table"), "*i32")
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides"), ("i32",) * 3)
    return compile_for_hopper(quantize_kernel, types, constants, num_warps=8, num_stages=3)


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("block_size", "head_dim", "v_head_dim", "window", "lse", "sinks", "tanh"),
    [
        (128, 128, 128, 0, 0, 0, "none"),
        (128, 128, 128, 0, 1, 1, "none"),
        (128, 64, 64, 0, 1, 0, "none"),
        (128, 128, 128, 0, 1, 1, "fast"),
        (128, 128, 128, 0, 0, 0, "short"),
        (128, 128, 128, 1, 0, 0, "none"),
        (128, 256, 128, 0, 0, 0, "none"),
        (64, 128, 128, 1, 1, 1, "fast"),
        (64, 64, 64, 0, 0, 0, "none"),
    ],
)
def test_no_registers_spill(
    block_size: int, head_dim: int, v_head_dim: int, window: int, lse: int, sinks: int, tanh: str, tmp_path: Path
) -> None:
    """And the products of one tile wait for nothing but each other: the assembler keeps them in groups."""
    numbers = block_size, head_dim, v_head_dim, window, lse, sinks
    run_alone(__file__, "attention", *numbers, tanh, tmp_path / "kernel")
    assert_no_spills(tmp_path / "kernel.cubin")
    assert_sound(tmp_path / "kernel.cubin", block_size, v_head_dim)


@pytest.mark.parametrize(
    ("block_size", "head_dim", "window", "tanh", "stack"),
    [
        (128, 128, 1, "none", 32),
        (128, 128, 1, "fast", 32),
        (128, 256, 0, "none", 64),
        (128, 256, 1, "fast", 88),
        (64, 256, 0, "none", 64),
    ],
)
def test_what_takes_more_registers_compiles(
    block_size: int, head_dim: int, window: int, tanh: str, stack: int, tmp_path: Path
) -> None:
    """With sinks and a log-sum-exp, too: a few registers' numbers live in memory, most of them only at the end."""
    run_alone(__file__, "attention", block_size, head_dim, head_dim, window, 1, 1, tanh, tmp_path / "kernel")
    if cuobjdump().exists():
        assert_no_spills(tmp_path / "kernel.cubin", stack)
        assert_sound(tmp_path / "kernel.cubin", block_size, head_dim)


def assert_sound(cubin: Path, block_size: int, v_head_dim: int) -> None:
    """Check that products are neither serialised nor fed from half-written registers.

    A consumer issues a group of products with keys and one with each piece of a tile's values, in the loop and once
    outside of it. The assembler once merged pairs of weights into registers that nothing wrote.
    """
    code = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    consumers = choose_fp8_tile(block_size, v_head_dim, v_head_dim).keys // 64
    pieces = -(-v_head_dim // 128)
    assert len(re.findall(r"QGMMA.*gsb0", code)) == consumers * (2 + 2 * pieces)
    assert not re.search(r"F2FP.*MERGE", code)


@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 0), (128, 16), (256, 16)])
def test_rounding_compiles(head_dim: int, page_size: int, tmp_path: Path) -> None:
    run_alone(__file__, "rounding", head_dim, page_size, tmp_path / "kernel")
    if cuobjdump().exists():
        assert_no_spills(tmp_path / "kernel.cubin")


if __name__ == "__main__":
    what, *numbers, path = sys.argv[1:]
    if what == "attention":
        block_size, head_dim, v_head_dim, window, lse, sinks = map(int, numbers[:6])
        switches = window == 1, lse == 1, sinks == 1, numbers[6]
        made = compile_attention(block_size, head_dim, v_head_dim, *switches)
        alone = choose_fp8_tile(block_size, head_dim, v_head_dim).keys == 128
        assert made.metadata.shared <= (SHARED_BYTES if alone else HALF_OF_SHARED_BYTES)
        assert re.search(r"wgmma.mma_async.sync.aligned.m64n\d+k32.f32.e4m3.e4m3", made.asm["ptx"])
    else:
        made = compile_rounding(*map(int, numbers))
        assert made.metadata.shared <= HALF_OF_SHARED_BYTES
        assert "cvt.rn.satfinite.e4m3x2.f32" in made.asm["ptx"]
    Path(path).with_suffix(".cubin").write_bytes(made.asm["cubin"])
