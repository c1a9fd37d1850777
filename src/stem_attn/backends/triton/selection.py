"""Make a selection on the GPU: three or four launches, nothing asked back from the device.

One pass over q, k and v pools them (and measures v); a batched matrix product scores block pairs; one program a row
keeps the best. Scores of many rows are made and used in passes, so that their memory stays bounded. Every layer of a
model asks for the same shapes, so all that follows from shapes is worked out once, as a plan.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.launch import Launch
from stem_attn.backends.triton.selection_kernels import pool_kernel, score_kernel, top_kernel, zscore_kernel
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.config import StemConfig
from stem_attn.selection import kept_per_row

SCORE_BYTES = 1 << 30
"""Memory that the scores of one pass may take."""
# Measured on an H100 (docs/log.md): 8 warps pool 13% slower; 512 keys a warp select 5% slower, 128 take 1.7x as long.
POOL_WARPS = 4
TOP_KEYS_PER_WARP = 1024

# Host tables that captured graphs copy from at every replay: they must outlive the graphs.
_captured: list[Tensor] = []


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig,
    scale: float,
    budget: Tensor,
    pages: Tensor | None = None,
    k_len: int | None = None,
) -> BlockSelection:
    """Choose the kept blocks; see `Backend.select` and `Backend.select_paged`.

    Args:
        q: [B, Hq, Tq, D], any strides.
        k: [B, Hkv, Tk, D]; [pages, Hkv, page_size, D] where `pages` is given, and then B = 1.
        v: [B, Hkv, Tk, Dv], likewise.
        config: The method; `block_size` must be a power of two.
        scale: Factor of the attention logits.
        budget: int32 [Qb] or [B, Qb] on the CPU; blocks.
        pages: int32, contiguous; the page of every page_size tokens of the sequence.
        k_len: Tokens of the sequence, where `pages` is given.

    Returns:
        The selection that the CPU backend makes, except where scores differ by less than their rounding. 16-bit
        inputs are pooled in float32 and multiplied with 11 significant bits.
    """
    with _on(q):
        return plan_for(q, k, v, config, scale, budget, k_len).run(q, k, v, pages)


def plan_for(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, budget: Tensor, k_len: int | None = None
) -> _Plan:
    """Find or make the plan of a call; the arguments are those of `select`."""
    page_size = 0 if k_len is None else k.shape[2]
    k_shape = k.shape if k_len is None else (1, k.shape[1], k_len, k.shape[3])
    aligned = (q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16)  # kernels are compiled for it
    layout = (q.shape, k_shape, v.shape[3], page_size, q.stride(), k.stride(), v.stride(), q.dtype, q.device, aligned)
    return _plan(layout, config, scale, budget.numpy().tobytes(), budget.ndim)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=256)
def _plan(layout: tuple[Any, ...], config: StemConfig, scale: float, budget: bytes, budget_dims: int) -> _Plan:
    return _Plan(layout, config, scale, budget, budget_dims)


@lru_cache(maxsize=256)
def _keep_table(budget: bytes, dims: int, grid: BlockGrid, config: StemConfig, pinned: bool) -> tuple[Tensor, int]:
    """Clip a budget to the rows, on the host; see `kept_per_row`."""
    table = torch.frombuffer(bytearray(budget), dtype=torch.int32)
    keep, width = kept_per_row(table.view(-1, grid.q_blocks) if dims == 2 else table, grid, config)
    return keep.pin_memory() if pinned else keep, width


class _Plan:
    """All that the shapes, strides, config and budget of a call decide: sizes, tables and launches.

    Args:
        layout: Shapes of q and k as if not paged, v's head dim, tokens a page or 0, strides of q, k and v, their dtype
            and device, and their addresses modulo 16.
        config: The method.
        scale: Factor of the attention logits.
        budget: The bytes of an int32 tensor [Qb] or [B, Qb].
        budget_dims: 1 or 2.
    """

    def __init__(
        self, layout: tuple[Any, ...], config: StemConfig, scale: float, budget: bytes, budget_dims: int
    ) -> None:
        q_shape, k_shape, v_dim, page_size, *strides, dtype, device, _ = layout
        self.grid = grid = BlockGrid(q_shape[2], k_shape[2], config.block_size)
        self.device = device
        self.keep, self.width = _keep_table(budget, budget_dims, grid, config, device.type == "cuda")
        self.keep_tables: dict[int, Tensor] = {}  # by stream
        batch, heads, _, dim = q_shape
        kv_heads = k_shape[1]
        self.rows = batch, heads, grid.q_blocks
        self.all_heads, self.all_rows = batch * kv_heads, heads // kv_heads * grid.q_blocks
        self.q_rows, self.k_rows = self.all_heads * self.all_rows, self.all_heads * grid.k_blocks
        per_block = grid.block_size // config.stride
        groups = grid.k_len // config.stride
        zscore = config.value_term == "zscore"
        valued = config.value_term == "log" or (zscore and groups > 1)  # one group has no deviation
        dim_pad = triton.next_power_of_2(dim)
        dim_out = -(-dim // 8) * 8  # descriptors want rows of whole 16 bytes
        self.pooled_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        self.depth = config.stride * dim_out
        self.logs_size = self.k_rows * per_block
        self.pool = Launch(
            pool_kernel,
            (self.q_rows + self.k_rows * (2 if valued else 1), 1),
            (
                *strides,
                batch * heads,
                self.all_heads,
                heads // kv_heads,
                kv_heads,
                grid.offset % grid.block_size,
                grid.q_len,
                grid.k_len,
                grid.q_blocks,
                grid.k_blocks,
                config.value_weight,
            ),
            {
                "D": dim,
                "DV": v_dim,
                "D_PAD": dim_pad,
                "DV_PAD": triton.next_power_of_2(v_dim),
                "D_OUT": dim_out,
                "BLOCK": grid.block_size,
                "STRIDE": config.stride,
                # 8 numbers a thread: 16 bytes.
                "TOKENS": min(max(config.stride, POOL_WARPS * 256 // dim_pad), grid.block_size),
                "PAGE": page_size,
                "ZSCORE": zscore and valued,
            },
            num_warps=POOL_WARPS,
        )
        self.zscore = None
        if zscore and valued:
            self.zscore = Launch(
                zscore_kernel,
                (self.all_heads, 1),
                (self.q_rows + self.k_rows, groups, grid.k_blocks, config.value_weight),
                {"PER_BLOCK": per_block, "CHUNK": 8192 // per_block},
                num_warps=8,
            )
        pitch = triton.cdiv(grid.k_blocks, 16) * 16
        pass_rows = min(self.all_rows, max(SCORE_BYTES // (4 * self.all_heads * pitch), 1))
        self.scores_size = self.all_heads * pass_rows * pitch
        self.tile, warps, stages = _score_tile(self.all_heads, pass_rows, grid.k_blocks, dtype)
        self.step = min(max(triton.next_power_of_2(self.depth), 16), 64 if self.pooled_dtype == torch.float16 else 16)
        columns = triton.next_power_of_2(pitch)
        self.passes = []
        for first_row in range(0, self.all_rows, pass_rows):
            rows = min(pass_rows, self.all_rows - first_row)
            score = Launch(
                score_kernel,
                (triton.cdiv(rows, self.tile) * triton.cdiv(grid.k_blocks, self.tile), self.all_heads),
                (
                    scale / config.stride,
                    first_row,
                    rows,
                    self.all_rows,
                    grid.q_blocks,
                    grid.k_blocks,
                    grid.first_block,
                    pitch,
                ),
                {"DEPTH": self.depth, "TILE": self.tile, "STEP": self.step, "VALUES": valued},
                num_warps=warps,
                num_stages=stages,
            )
            top = Launch(
                top_kernel,
                (rows, self.all_heads),
                (
                    first_row,
                    self.all_rows,
                    grid.q_blocks,
                    grid.first_block,
                    pitch,
                    config.sink_blocks,
                    config.local_blocks,
                    kv_heads,
                    grid.q_blocks if budget_dims == 2 else 0,
                    self.width,
                ),
                {
                    "COLUMNS": columns,
                    "SLOTS": triton.next_power_of_2(self.width),
                    "INSIDE": config.forced_blocks == "inside",
                },
                num_warps=min(max(columns // TOP_KEYS_PER_WARP, 1), 16),
            )
            self.passes.append((score, top))

    def run(self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None = None) -> BlockSelection:
        """Make the selection of inputs of this plan's layout on the current device and stream."""
        pooled, table = self.pool_inputs(q, k, v, pages)
        keep = self.keep_on_device()
        scores = torch.empty(self.scores_size, dtype=torch.float32, device=self.device)
        indices = torch.empty((*self.rows, self.width), dtype=torch.int32, device=self.device)
        counts = torch.empty(self.rows, dtype=torch.int32, device=self.device)
        tiles = TensorDescriptor(pooled, pooled.shape, [self.depth, 1], [self.tile, self.step])
        for score, top in self.passes:
            score(tiles, table, scores)
            top(scores, keep, indices, counts)
        grid = self.grid
        return BlockSelection(indices, counts, grid.block_size, grid.q_len, grid.k_len)

    def pool_inputs(self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read q, k and v once.

        Returns:
            pooled [q rows + k rows, stride * D], D rounded up to a multiple of 8, and a float32 table: the powers of
            two that these rows were divided by, then the weighted value term of the k rows.
        """
        rows = self.q_rows + self.k_rows
        pooled = torch.empty((rows, self.depth), dtype=self.pooled_dtype, device=self.device)
        table = torch.empty(rows + self.k_rows, dtype=torch.float32, device=self.device)
        block_table = table if pages is None else pages
        if self.zscore is None:
            self.pool(q, k, v, pooled, table, table, block_table)
        else:
            logs = torch.empty(self.logs_size, dtype=torch.float32, device=self.device)
            self.pool(q, k, v, pooled, table, logs, block_table)
            self.zscore(logs, table)
        return pooled, table

    def keep_on_device(self) -> Tensor:
        """Copy the table of blocks to take to the device, once a stream, and within a captured graph each time."""
        if self.device.type != "cuda":
            return self.keep
        if torch.cuda.is_current_stream_capturing():
            _captured.append(self.keep)
            return self.keep.to(self.device, non_blocking=True)
        stream = torch.cuda.current_stream().cuda_stream
        table = self.keep_tables.get(stream)
        if table is None:
            table = self.keep_tables[stream] = self.keep.to(self.device, non_blocking=True)
        return table


def _score_tile(heads: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Pick the side of a score tile, warps and stages: large tiles read less, small ones fill the device."""
    if dtype == torch.float32:
        return 64, 4, 2
    if heads * triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= 512:
        return 128, 4, 3
    return 64, 4, 4
