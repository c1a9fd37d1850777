"""The portable kernel in float32 for a Hopper GPU, without one: its unrolled products must not take minutes."""

from typing import Any

import pytest

from compiling import compile_for_hopper, run_alone

pytest.importorskip("triton", minversion="3.6")

HEAD_DIM = 256  # the largest
MOST_SECONDS = 60  # 5 on an idle core; 131 with the tile that there was


def compile_kernel() -> None:
    """Compile for blocks of 128, with the tile that these get."""
    from stem_attn.backends.triton.attention_kernel import attention_kernel
    from stem_attn.backends.triton.tiles import choose_tile

    tile = choose_tile(block_size=128, head_dim=HEAD_DIM, item_bytes=4, tma=True)
    constants = dict.fromkeys(("D", "DV", "D_PAD", "DV_PAD"), HEAD_DIM) | {"BLOCK": 128, "KEYS": tile.keys, "PAGE": 0}
    constants |= {"TMA": True, "PACKED": False, "WINDOW": False, "LSE": True, "PRECISION": "ieee", "MAY_SKIP": False}
    constants |= {"SINKS": True, "TANH": "exact"}
    tokens = {"q": 128, "k": tile.keys, "v": tile.keys}
    types: dict[str, Any] = {n: f"tensordesc<fp32[1, 1, {t}, {HEAD_DIM}]>" for n, t in tokens.items()}
    types |= {"out": "*fp32", "lse": "*fp32", "sinks": "*fp32"}
    types |= dict.fromkeys(("scale_log2", "tanh_factor"), "fp32")
    tables = ("indices", "counts", "row_sequence", "first_rows", "q_starts", "k_starts", "block_table")
    types |= dict.fromkeys(tables, "*i32")
    types |= dict.fromkeys((f"{n}_strides" for n in ("q", "k", "v", "out")), ("i32",) * 4)
    compile_for_hopper(attention_kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)


def test_it_compiles_in_seconds() -> None:
    run_alone(__file__, timeout=MOST_SECONDS, TRITON_ALWAYS_COMPILE="1")


if __name__ == "__main__":
    compile_kernel()
