"""The kernels with 8-bit products for a Hopper GPU, compiled without one; what the assembler makes of them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compiling import assert_no_spills, compile_for_hopper, cuobjdump, run_alone

pytest.importorskip("triton", minversion="3.6")
SHARED_BYTES = 227 << 10  # what a Hopper program may take


def compile_attention(head_dim: int, window: bool, lse: bool, sinks: bool, tanh: str) -> Any:
    """Compile the attention kernel for compute capability 9.0."""
    from stem_attn.backends.triton.hopper_fp8_kernel import box_layout, hopper_fp8_kernel

    boxes = {"q": (64, head_dim), "k": (128, head_dim), "v": (head_dim, 128)}
    constants = {"DV": head_dim, "STAGES": 2, "WINDOW": window, "LSE": lse, "SINKS": sinks, "TANH": tanh}
    types: dict[str, Any] = {"out": "*bf16", "sinks": "*bf16", "out_strides": ("i32",) * 4}
    types |= dict.fromkeys(("lse", "q_scales", "kv_scales", "shifts"), "*fp32")
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    types |= dict.fromkeys(("indices", "counts", "unsafe"), "*i32")
    types |= {n: f"tensordesc<fp8e4nv[1, 1, {t}, {d}],{box_layout(t, d)!r}>" for n, (t, d) in boxes.items()}
    return compile_for_hopper(hopper_fp8_kernel, types, constants, num_warps=4, maxnreg=168)


def compile_rounding(head_dim: int, page_size: int) -> Any:
    """Compile the kernel that rounds q, k and v."""
    from stem_attn.backends.triton.quantize_kernels import quantize_kernel

    constants = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD", "DIMS"), head_dim)
    constants |= {"BLOCK": 128, "TOKENS": 64, "SHIFTS": True, "PAGE": page_size}
    types: dict[str, Any] = dict.fromkeys(("q", "k", "v"), "*bf16") | dict.fromkeys(("q8", "k8", "v8"), "*fp8e4nv")
    types |= dict.fromkeys(("means", "scales", "q_scales", "shifts"), "*fp32")
    types |= dict.fromkeys(("unsafe", "block_table"), "*i32")
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides"), ("i32",) * 3)
    return compile_for_hopper(quantize_kernel, types, constants, num_warps=8, num_stages=3)


@pytest.mark.skipif(not cuobjdump().exists(), reason="this Triton does not bring cuobjdump")
@pytest.mark.parametrize(
    ("head_dim", "window", "lse", "sinks", "tanh"),
    [
        (128, 0, 0, 0, "none"),
        (128, 0, 1, 1, "none"),
        (64, 0, 1, 0, "none"),
        (128, 0, 1, 1, "fast"),
        (128, 0, 0, 0, "short"),
        (128, 1, 0, 0, "none"),
    ],
)
def test_no_registers_spill(head_dim: int, window: int, lse: int, sinks: int, tanh: str, tmp_path: Path) -> None:
    """And the products of one tile wait for nothing but each other: the assembler keeps them in groups."""
    run_alone(__file__, "attention", head_dim, window, lse, sinks, tanh, tmp_path / "kernel")
    assert_no_spills(tmp_path / "kernel.cubin")
    code = subprocess.run([cuobjdump(), "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
    groups = len(re.findall(r"QGMMA.*gsb0", code))
    assert len(re.findall("QGMMA", code)) >= (4 if head_dim == 128 else 2) * groups


@pytest.mark.parametrize("tanh", ["none", "fast"])
def test_windows_compile_with_everything_else(tanh: str, tmp_path: Path) -> None:
    """A window, sinks and a log-sum-exp take registers that are not there: up to 8 of a thread's live in memory."""
    run_alone(__file__, "attention", 128, 1, 1, 1, tanh, tmp_path / "kernel")
    if cuobjdump().exists():
        report = subprocess.run(
            [cuobjdump(), "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        ).stdout
        assert max(int(n) for n in re.findall(r"STACK:(\d+)", report)) <= 32


@pytest.mark.parametrize("page_size", [0, 16])
def test_rounding_compiles(page_size: int, tmp_path: Path) -> None:
    run_alone(__file__, "rounding", 128, page_size, tmp_path / "kernel")
    if cuobjdump().exists():
        assert_no_spills(tmp_path / "kernel.cubin")


if __name__ == "__main__":
    what, *numbers, path = sys.argv[1:]
    if what == "attention":
        head_dim, window, lse, sinks = map(int, numbers[:4])
        made = compile_attention(head_dim, window == 1, lse == 1, sinks == 1, numbers[4])
        assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in made.asm["ptx"]
    else:
        made = compile_rounding(*map(int, numbers))
        assert "cvt.rn.satfinite.e4m3x2.f32" in made.asm["ptx"]
    assert made.metadata.shared <= SHARED_BYTES
    Path(path).with_suffix(".cubin").write_bytes(made.asm["cubin"])
