"""The launches that read q, k and v once, and pool them."""

from __future__ import annotations

from typing import Any

import triton

from stem_attn.backends.triton.launch import Launch
from stem_attn.backends.triton.selection_kernels import pool_kernel, zscore_kernel
from stem_attn.backends.triton.selection_sizes import Sizes

# Measured on an H100 (docs/log.md): 8 warps pool 13% slower.
POOL_WARPS = 4


def pool_launch(sizes: Sizes, strides: list[tuple[int, ...]], v_dim: int, page_size: int, scale: float) -> Launch:
    """Plan the pooling of q, k and v.

    Args:
        sizes: Of the selection.
        strides: Of q, k and v.
        v_dim: Head dim of v.
        page_size: Tokens a page, or 0.
        scale: Factor of the attention logits.
    """
    grid, config = sizes.grid, sizes.config
    dim_pad = triton.next_power_of_2(sizes.dim)
    numbers: tuple[Any, ...] = (
        *strides,
        sizes.batch * sizes.heads,
        sizes.all_heads,
        sizes.group,
        sizes.kv_heads,
        grid.offset % grid.block_size,
        grid.q_len,
        grid.k_len,
        grid.q_blocks,
        grid.k_blocks,
        config.value_weight,
        config.spread_weight * scale / 4,  # half of the variance, and of the pair of squares
    )
    constants = {
        "D": sizes.dim,
        "DV": v_dim,
        "D_PAD": dim_pad,
        "DV_PAD": triton.next_power_of_2(v_dim),
        "D_OUT": sizes.dim_out,
        "SPREAD": sizes.spread,
        "BLOCK": grid.block_size,
        "STRIDE": config.stride,
        "Q_STRIDE": sizes.q_stride,
        "RUNS": sizes.mass,
        # 8 numbers a thread: 16 bytes.
        "TOKENS": min(max(sizes.slots, POOL_WARPS * 256 // dim_pad), grid.block_size),
        "PAGE": page_size,
        "ZSCORE": sizes.zscored,
        "CHAINED": sizes.chained,
    }
    programs = sizes.q_rows + sizes.k_rows * (2 if sizes.valued else 1)
    return Launch(pool_kernel, (programs, 1), numbers, constants, num_warps=POOL_WARPS)


def zscore_launch(sizes: Sizes) -> Launch | None:
    """Plan what makes the value term of magnitudes; None where it is not needed."""
    if not sizes.zscored:
        return None
    return Launch(
        zscore_kernel,
        (sizes.all_heads, 1),
        (sizes.q_rows + sizes.k_rows, sizes.groups, sizes.grid.k_blocks, sizes.config.value_weight),
        {"PER_BLOCK": sizes.per_block, "CHUNK": 8192 // sizes.per_block},
        num_warps=8,
    )
