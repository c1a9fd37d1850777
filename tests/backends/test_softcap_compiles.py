"""Kernels with sinks and a softcap for GPUs that are not here: the interpreter takes what the compiler refuses."""

import sys
from typing import Any

import pytest

from compiling import compile_for, run_alone

pytest.importorskip("triton", minversion="3.6")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DIM = 64
FOURS = ("i32",) * 4


def compile_attention(target: tuple[str, Any, int], dtype: str, tanh: str) -> Any:
    """Compile the portable attention kernel, without descriptors, for blocks of 64."""
    from stem_attn.backends.triton.attention_kernel import attention_kernel
    from stem_attn.backends.triton.tiles import choose_tile

    tile = choose_tile(block_size=64, head_dim=DIM, item_bytes=2, tma=False)
    constants = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD"), DIM) | {"BLOCK": 64, "KEYS": tile.keys, "PAGE": 0}
    constants |= {"TMA": False, "PACKED": False, "WINDOW": True, "LSE": True, "SINKS": True, "TANH": tanh}
    constants |= {"PRECISION": "tf32", "MAY_SKIP": True}
    types: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"lse": "*fp32", "sinks": "*bf16"}
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    tables = ("indices", "counts", "row_sequence", "first_rows", "q_starts", "k_starts", "block_table")
    types |= dict.fromkeys(tables, "*i32")
    types |= dict.fromkeys((f"{n}_strides" for n in ("q", "k", "v", "out")), FOURS)
    return compile_for(target, attention_kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)


def compile_masses(target: tuple[str, Any, int], tanh: str) -> Any:
    """Compile what makes scores of masses."""
    from stem_attn.backends.triton.mass_kernels import mass_kernel
    from stem_attn.backends.triton.tiles import choose_mass_tile

    rows, columns, warps, stages = choose_mass_tile(DIM * 3 // 2, 16, 8, 2)
    constants = {"BLOCK": 128, "STRIDE": 8, "Q_STRIDE": 16, "DEPTH": DIM * 3 // 2, "STEP": 32, "CHUNK": 4 * warps}
    constants |= {"ROWS": rows, "COLUMNS": columns, "VALUES": True, "SINKS": True, "TANH": tanh}
    constants |= {"CUDA": target[0] == "cuda", "CHAINED": False}
    types: dict[str, Any] = dict.fromkeys(("table", "masses", "scores"), "*fp32") | {"sinks": "*bf16"}
    types |= dict.fromkeys(("factor", "cap_log2"), "fp32")
    types |= {"queries": f"tensordesc<fp16[{rows}, 32]>", "keys": f"tensordesc<fp16[{columns}, 32]>"}
    return compile_for(target, mass_kernel, types, constants, num_warps=warps, num_stages=stages)


def compile_linear_scores(target: tuple[str, Any, int], tanh: str) -> Any:
    """Compile the product of pooled blocks."""
    from stem_attn.backends.triton.selection_kernels import score_kernel

    constants = {"DEPTH": 512, "TILE": 64, "STEP": 64, "VALUES": True, "TANH": tanh}
    types = {"pooled": "tensordesc<fp16[64, 64]>", "table": "*fp32", "scores": "*fp32"}
    types |= dict.fromkeys(("factor", "softcap"), "fp32")
    return compile_for(target, score_kernel, types, constants, num_warps=4, num_stages=2)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str) -> None:
    run_alone(__file__, target)


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    fast = "fast" if target[0] == "cuda" else "short"
    made = compile_attention(target, "bf16", fast)
    assert ("tanh.approx" in made.asm.get("ptx", "")) == (fast == "fast")
    compile_attention(target, "fp16", "short")
    compile_masses(target, fast)
    compile_linear_scores(target, fast)
