"""The kernels of an audit, for GPUs that are not here: they fit, float32 at the largest head dim too."""

import sys
from typing import Any

import pytest

from compiling import compile_for, run_alone

pytest.importorskip("triton", minversion="3.6")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_120": ("cuda", 120, 32)}
TARGETS |= {"gfx942": ("hip", "gfx942", 64)}
SHARED_BYTES = 64 << 10  # AMD's; NVIDIA's smallest is 99 KiB
CASES = [("fp32", 256, 0), ("fp32", 64, 16), ("bf16", 256, 0), ("bf16", 128, 16)]  # number, head dim, tokens a page


def compile_kernels(target: tuple[str, Any, int], number: str, head_dim: int, page: int) -> list[Any]:
    """Compile for blocks of 128, with the tile that these get."""
    from stem_attn.backends.triton.exact_rows_kernel import compare_kernel, exact_kernel
    from stem_attn.backends.triton.tiles import choose_exact_rows_tile
    from stem_attn.backends.triton.verdict_kernel import sums_kernel, verdict_kernel

    item_bytes = 4 if number == "fp32" else 2
    tile = choose_exact_rows_tile(block_size=128, head_dim=head_dim, item_bytes=item_bytes)
    sums = ("tile_peaks", "tile_sums", "chunk_peaks", "chunk_sums", "chunk_outs")
    shared = dict.fromkeys(sums, "*fp32") | {"places": "*i64"}
    types: dict[str, Any] = shared | dict.fromkeys("qkv", f"*{number}") | {"block_table": "*i32"}
    types |= {"factor": "fp32", "cap": "fp32"} | {f"{name}_strides": ("i32",) * 3 for name in "qkv"}
    constants: dict[str, Any] = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD"), head_dim) | {"ROWS": 32}
    constants |= {"KEYS": tile.keys, "PAGE": page, "WINDOW": True, "TANH": "exact", "HALVES": item_bytes == 2}
    exact = compile_for(target, exact_kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)

    types = shared | {"out": f"*{number}", "indices": "*i32", "counts": "*i32", "sinks": "*fp32", "found": "*fp32"}
    types |= {"out_strides": ("i32",) * 3}
    constants = {"DV": head_dim, "DV_PAD": head_dim, "BLOCK": 128, "KEYS": tile.keys, "SLOTS": 128}
    constants |= {"CHUNKS": 64, "SINKS": True}
    compared = compile_for(target, compare_kernel, types, constants)
    summed = compile_for(target, sums_kernel, {"found": "*fp32", "sums": "*fp64"}, {"CELLS": 1024})
    types = {"sums": "*fp64", "missed": "*i1", "min_recall": "fp32", "max_error": "fp32"}
    return [exact, compared, summed, compile_for(target, verdict_kernel, types, {}, num_warps=1)]


@pytest.mark.parametrize("target", TARGETS)
def test_they_fit(target: str) -> None:
    run_alone(__file__, target)


if __name__ == "__main__":
    for case in CASES:
        for made in compile_kernels(TARGETS[sys.argv[1]], *case):
            assert made.metadata.shared <= SHARED_BYTES, (case, made.metadata.shared)
