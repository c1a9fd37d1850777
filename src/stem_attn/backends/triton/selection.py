"""Make a selection on the GPU: three or four launches, nothing asked back from the device.

One pass over q, k and v pools them (and measures v); a batched matrix product scores block pairs; one program a row
keeps the best. Scores of many rows are made and used in passes, so that their memory stays bounded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.selection_kernels import pool_kernel, score_kernel, top_kernel, zscore_kernel
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.config import StemConfig
from stem_attn.selection import kept_per_row

SCORE_BYTES = 1 << 30
"""Memory that the scores of one pass may take."""
POOL_WARPS = 4
TOP_KEYS_PER_WARP = 512

# Host tables that captured graphs copy from at every replay: they must outlive the graphs.
_captured: list[Tensor] = []


def select(q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig, scale: float, budget: Tensor) -> BlockSelection:
    """Choose the kept blocks; see `Backend.select`.

    Args:
        q: [B, Hq, Tq, D], any strides.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        config: The method; `block_size` must be a power of two.
        scale: Factor of the attention logits.
        budget: int32 [Qb] or [B, Qb] on the CPU; blocks.

    Returns:
        The selection that the CPU backend makes, except where scores differ by less than their rounding. 16-bit
        inputs are pooled in float32 and multiplied with 11 significant bits.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    keep, width = _keep_table(budget.numpy().tobytes(), budget.ndim, grid, config, q.is_cuda)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(keep)
    with _on(q):
        keep = keep.to(q.device, non_blocking=True)
        pooled, scales, values = _pool(q, k, v, grid, config)
        return _select_pooled(pooled, scales, values, keep, q, k, grid, config, scale, width)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=64)
def _keep_table(budget: bytes, ndim: int, grid: BlockGrid, config: StemConfig, pinned: bool) -> tuple[Tensor, int]:
    """Clip a budget to the rows, in pinned memory; cached because every layer of a model asks for the same."""
    table = torch.frombuffer(bytearray(budget), dtype=torch.int32)
    keep, width = kept_per_row(table.view(-1, grid.q_blocks) if ndim == 2 else table, grid, config)
    return keep.pin_memory() if pinned else keep, width


def _pool(q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, config: StemConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read q, k and v once.

    Returns:
        pooled [B * Hq * Qb + B * Hkv * Kb, stride * D], D rounded up to a multiple of 8; the powers of two it was
        divided by, float32 [rows]; and the weighted value term, float32 [B, Hkv, Kb], or None.
    """
    batch, heads, _, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    q_rows, k_rows = batch * heads * grid.q_blocks, batch * kv_heads * grid.k_blocks
    stride, per_block = config.stride, config.block_size // config.stride
    groups = grid.k_len // stride
    zscore = config.value_term == "zscore"
    valued = config.value_term == "log" or (zscore and groups > 1)  # one group has no deviation
    pooled_dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    dim_out = -(-dim // 8) * 8  # descriptors want rows of whole 16 bytes
    pooled = q.new_empty(q_rows + k_rows, stride * dim_out, dtype=pooled_dtype)
    scales = q.new_empty(q_rows + k_rows, dtype=torch.float32)
    values = q.new_empty(batch, kv_heads, grid.k_blocks * (per_block if zscore else 1), dtype=torch.float32)
    dim_pad = triton.next_power_of_2(dim)
    pool_kernel[(q_rows + k_rows * (2 if valued else 1),)](
        q,
        k,
        v,
        pooled,
        scales,
        values,
        q.stride(),
        k.stride(),
        v.stride(),
        batch * heads,
        batch * kv_heads,
        heads // kv_heads,
        kv_heads,
        grid.offset % grid.block_size,
        grid.q_len,
        grid.k_len,
        grid.q_blocks,
        grid.k_blocks,
        config.value_weight,
        D=dim,
        DV=value_dim,
        D_PAD=dim_pad,
        DV_PAD=triton.next_power_of_2(value_dim),
        D_OUT=dim_out,
        BLOCK=grid.block_size,
        STRIDE=stride,
        TOKENS=min(max(stride, POOL_WARPS * 256 // dim_pad), grid.block_size),  # 8 numbers a thread: 16 bytes
        ZSCORE=zscore,
        num_warps=POOL_WARPS,
    )
    if not valued:
        return pooled, scales, None
    if zscore:
        logs, values = values, q.new_empty(batch, kv_heads, grid.k_blocks, dtype=torch.float32)
        zscore_kernel[(batch * kv_heads,)](
            logs,
            values,
            groups,
            grid.k_blocks,
            config.value_weight,
            PER_BLOCK=per_block,
            CHUNK=8192 // per_block,
            num_warps=8,
        )
    return pooled, scales, values


def _select_pooled(
    pooled: Tensor,
    scales: Tensor,
    values: Tensor | None,
    keep: Tensor,
    q: Tensor,
    k: Tensor,
    grid: BlockGrid,
    config: StemConfig,
    scale: float,
    width: int,
) -> BlockSelection:
    """Score the rows and keep the best blocks of each, in passes of at most SCORE_BYTES."""
    batch, heads, _, _ = q.shape
    kv_heads = k.shape[1]
    all_heads, all_rows = batch * kv_heads, heads // kv_heads * grid.q_blocks
    q_pooled, k_pooled = pooled.split([all_heads * all_rows, all_heads * grid.k_blocks])
    q_scales, k_scales = scales.split([all_heads * all_rows, all_heads * grid.k_blocks])
    pitch = triton.cdiv(grid.k_blocks, 16) * 16
    pass_rows = min(all_rows, max(SCORE_BYTES // (4 * all_heads * pitch), 1))
    scores = q.new_empty(all_heads * pass_rows * pitch, dtype=torch.float32)
    indices = q.new_empty(batch, heads, grid.q_blocks, width, dtype=torch.int32)
    counts = q.new_empty(batch, heads, grid.q_blocks, dtype=torch.int32)
    tile_rows, tile_columns, warps, stages = _score_tile(all_heads, pass_rows, grid.k_blocks, pooled.dtype)
    depth = pooled.shape[1]
    step = min(max(triton.next_power_of_2(depth), 16), 64 if pooled.dtype == torch.float16 else 16)
    q_tiles = TensorDescriptor(q_pooled, q_pooled.shape, q_pooled.stride(), [tile_rows, step])
    k_tiles = TensorDescriptor(k_pooled, k_pooled.shape, k_pooled.stride(), [tile_columns, step])
    columns = triton.next_power_of_2(pitch)
    for first_row in range(0, all_rows, pass_rows):
        rows = min(pass_rows, all_rows - first_row)
        score_kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(grid.k_blocks, tile_columns), all_heads)](
            q_tiles,
            k_tiles,
            q_scales,
            k_scales,
            values if values is not None else scores,
            scores,
            scale / config.stride,
            first_row,
            rows,
            all_rows,
            grid.q_blocks,
            grid.k_blocks,
            grid.first_block,
            pitch,
            DEPTH=depth,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            STEP=step,
            VALUES=values is not None,
            num_warps=warps,
            num_stages=stages,
        )
        top_kernel[(rows, all_heads)](
            scores,
            keep,
            indices,
            counts,
            first_row,
            all_rows,
            grid.q_blocks,
            grid.first_block,
            pitch,
            config.sink_blocks,
            config.local_blocks,
            kv_heads,
            grid.q_blocks if keep.ndim == 2 else 0,
            width,
            COLUMNS=columns,
            SLOTS=triton.next_power_of_2(width),
            INSIDE=config.forced_blocks == "inside",
            num_warps=min(max(columns // TOP_KEYS_PER_WARP, 1), 16),
        )
    return BlockSelection(indices, counts, grid.block_size, grid.q_len, grid.k_len)


def _score_tile(heads: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Pick rows and columns of a score tile, warps and stages: large tiles read less, small ones fill the device."""
    if dtype == torch.float32:
        return 64, 64, 4, 2
    if heads * triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= 512:
        return 128, 128, 8, 3
    return 64, 64, 4, 4
