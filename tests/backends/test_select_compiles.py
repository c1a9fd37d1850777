"""Selection's and attention's kernels for GPUs that are not here, as their launches there are."""

import sys
from typing import Any

import pytest

from compiling import compile_for, run_alone

pytest.importorskip("triton", minversion="3.6")

Target = tuple[str, Any, int]

TARGETS: dict[str, Target] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
FOURS = ("i32",) * 4
DIM = 128


def compile_pooling(target: Target, chained: bool, runs: bool) -> Any:
    """Compile the pooling of pages, for masses with `runs`, otherwise for block means and z-scores of values."""
    from stem_attn.backends.triton.selection_kernels import pool_kernel

    constants = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD"), DIM) | {"D_OUT": DIM * 3 // 2 if runs else DIM}
    constants |= {"BLOCK": 128, "STRIDE": 8, "Q_STRIDE": 16 if runs else 8, "TOKENS": 16 if runs else 8, "PAGE": 16}
    constants |= {"SPREAD": runs, "RUNS": runs, "ZSCORE": not runs, "CHAINED": chained}
    types: dict[str, Any] = dict.fromkeys(("q", "k", "v"), "*bf16") | {"pooled": "*fp16", "block_table": "*i32"}
    types |= dict.fromkeys(("table", "logs"), "*fp32") | dict.fromkeys(("weight", "spread"), "fp32")
    types |= dict.fromkeys((f"{name}_strides" for name in ("q", "k", "v")), FOURS)
    return compile_for(target, pool_kernel, types, constants, num_warps=4)


def compile_z_scores(target: Target) -> Any:
    from stem_attn.backends.triton.selection_kernels import zscore_kernel

    types = {"logs": "*fp32", "table": "*fp32", "weight": "fp32"}
    return compile_for(target, zscore_kernel, types, {"PER_BLOCK": 16, "CHUNK": 512}, num_warps=8)


def compile_top(target: Target) -> Any:
    from stem_attn.backends.triton.selection_kernels import top_kernel

    types = {"scores": "*fp32", "keep": "*i32", "indices": "*i32", "counts": "*i32"}
    constants = {"COLUMNS": 1024, "INSIDE": True, "SHARED": False}
    return compile_for(target, top_kernel, types, constants, num_warps=1)


def compile_masses(target: Target, chained: bool) -> Any:
    from stem_attn.backends.triton.mass_kernels import mass_kernel
    from stem_attn.backends.triton.tiles import choose_mass_tile

    rows, columns, warps, stages = choose_mass_tile(DIM * 3 // 2, 16, 8, 2)
    constants = {"BLOCK": 128, "STRIDE": 8, "Q_STRIDE": 16, "DEPTH": DIM * 3 // 2, "STEP": 64, "CHUNK": 4 * warps}
    constants |= {"ROWS": rows, "COLUMNS": columns, "VALUES": True, "SINKS": False, "TANH": "none"}
    constants |= {"CUDA": target[0] == "cuda", "CHAINED": chained}
    types: dict[str, Any] = dict.fromkeys(("table", "masses", "scores", "sinks"), "*fp32")
    types |= dict.fromkeys(("factor", "cap_log2"), "fp32")
    types |= {"queries": f"tensordesc<fp16[{rows}, 64]>", "keys": f"tensordesc<fp16[{columns}, 64]>"}
    return compile_for(target, mass_kernel, types, constants, num_warps=warps, num_stages=stages)


def compile_attention(target: Target, tma: bool, size: int, dim: int) -> Any:
    """Compile the portable kernel for blocks of `size`, with descriptors or without."""
    from stem_attn.backends.triton.attention_kernel import attention_kernel
    from stem_attn.backends.triton.tiles import choose_tile

    tile = choose_tile(block_size=size, head_dim=dim, item_bytes=2, tma=tma)
    constants = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD"), dim) | {"BLOCK": size, "KEYS": tile.keys, "PAGE": 0}
    constants |= dict.fromkeys(("PACKED", "WINDOW", "LSE", "SINKS", "MAY_SKIP"), False)
    constants |= {"TMA": tma, "TANH": "none", "PRECISION": "tf32"}
    types: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"lse": "*fp32", "sinks": "*bf16"}
    if tma:
        boxes = {"q": (size, dim), "k": (tile.keys, dim), "v": (tile.keys, dim)}
        types |= {name: f"tensordesc<bf16[1, 1, {rows}, {columns}]>" for name, (rows, columns) in boxes.items()}
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    tables = ("indices", "counts", "row_sequence", "first_rows", "q_starts", "k_starts", "block_table")
    types |= dict.fromkeys(tables, "*i32")
    types |= dict.fromkeys((f"{name}_strides" for name in ("q", "k", "v", "out")), FOURS)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None and target[0] == "cuda":
        options["maxnreg"] = tile.registers
    return compile_for(target, attention_kernel, types, constants, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str) -> None:
    run_alone(__file__, target)


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    newer = target[0] == "cuda" and target[1] >= 90
    for runs in (True, False):
        compile_pooling(target, newer, runs)
    compile_z_scores(target)
    compile_top(target)
    compile_masses(target, newer)
    for size, dim in ((128, 128), (64, 256)):
        compile_attention(target, newer and target[1] in (90, 100), size, dim)
