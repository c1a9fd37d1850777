"""Make a selection on the GPU: a few launches, nothing asked back from the device.

One pass over q, k and v pools them (and measures v); matrix products score block pairs; where heads share budgets, one
program a query block counts what each of them keeps; one program a row keeps the best. Scores of many query blocks are
made and used in passes, so that their memory stays bounded. Every layer of a model asks for the same shapes, so all
that follows from shapes is worked out once.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.attention import gluon_runs_on
from stem_attn.backends.triton.choose_kernel import choose_kernel
from stem_attn.backends.triton.launch import Launch, on_device
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.mass_kernels import mass_kernel
from stem_attn.backends.triton.selection_kernels import pool_kernel, score_kernel, top_kernel, zscore_kernel
from stem_attn.backends.triton.share_kernel import share_kernel
from stem_attn.backends.triton.tiles import choose_hopper_mass_tile, choose_mass_tile, choose_score_tile
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import Budget
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part
from stem_attn.selection import kept_at_least, kept_per_row, most_kept

SCORE_BYTES = 1 << 30
"""Memory that the scores of one pass may take, and the masses that they are made from."""
# Measured on an H100 (docs/log.md): 8 warps pool 13% slower; 512 keys a warp select 5% slower, 128 take 1.7x as long.
POOL_WARPS = 4
TOP_KEYS_PER_WARP = 1024
# Keys of all heads that `share_kernel` looks at together: 16 a thread.
SHARE_KEYS = 4096
# Keys of all heads of a row that `choose_kernel` holds in registers: 64 a thread.
CHOOSE_KEYS = 32768

# Host tables that captured graphs copy from at every replay, by their numbers: they must outlive the graphs.
_captured: dict[tuple[int, ...], Tensor] = {}

# Fields of a config that only a `KeepTable` reads: layers that differ in these share their launches.
_BUDGET_FIELDS = (
    "budget_ratio",
    "budget_bias",
    "budget_scale",
    "budget_floor",
    "dense_below",
    "decay",
    "decay_from",
    "tail_blocks",
    "tail_ratio",
    "head_floor",
    "residual",
)


def select(call: Call, part: Part, config: StemConfig, budget: Budget) -> BlockSelection:
    """Choose the kept blocks of a part; see `Backend.select`.

    Returns:
        The selection that the CPU backend makes, except where scores differ by less than their rounding. 16-bit
        inputs are pooled in float32 and multiplied with 11 significant bits.
    """
    if call.scale < 0:
        part, call = dataclasses.replace(part, q=-part.q), dataclasses.replace(call, scale=-call.scale)
    with on_device(part.q.device):
        launches = launches_for(call, part, config)
        return launches.run(part, call, keep_table(budget, launches.rivals, part.q.device))


def launches_for(call: Call, part: Part, config: StemConfig) -> SelectionLaunches:
    """Find or make the launches of a part; `config.block_size` must be a power of two."""
    q, k, v = part.q, part.k, part.v
    page_size = 0 if part.pages is None else k.shape[2]
    k_shape = (q.shape[0], k.shape[1], part.k_len, k.shape[3])
    aligned = (q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16)  # kernels are compiled for it
    layout = (q.shape, k_shape, v.shape[3], page_size, q.stride(), k.stride(), v.stride(), q.dtype, q.device, aligned)
    return _launches(layout, _without_budget(config), Logits.of(call, call.scale))


@lru_cache(maxsize=256)
def _launches(layout: tuple[Any, ...], config: StemConfig, logits: Logits) -> SelectionLaunches:
    return SelectionLaunches(layout, config, logits)


@lru_cache(maxsize=1024)
def _without_budget(config: StemConfig) -> StemConfig:
    defaults = StemConfig()
    return dataclasses.replace(config, **{name: getattr(defaults, name) for name in _BUDGET_FIELDS})


@lru_cache(maxsize=1024)
def keep_table(budget: Budget, rivals: int, device: torch.device) -> KeepTable:
    """Find or make the table of a budget.

    Args:
        budget: Of a prompt or a batch of prompts.
        rivals: Heads that share budgets; at most 1: none do.
        device: Where kernels read it.
    """
    return KeepTable(budget, rivals, device)


class KeepTable:
    """What the kernels read of a budget: a number for every row of the whole prompt, so that all chunks share it.

    `stride` leads from one batch row to the next, 0 where they share a budget; `least_at` to the blocks that every head
    keeps at least, which follow where heads share budgets.
    """

    def __init__(self, budget: Budget, rivals: int, device: torch.device) -> None:
        config, blocks = budget.config, budget.blocks
        tokens = blocks.shape[-1] * config.block_size
        prompt = BlockGrid(tokens, tokens, config.block_size)
        keep, _ = kept_per_row(blocks, prompt, config)
        most = most_kept(blocks, prompt, config)
        self.stride = blocks.shape[-1] if blocks.ndim == 2 else 0
        self.least_at = keep.numel()
        if rivals > 1:  # a head keeps the most when all others keep the least
            least = kept_at_least(keep, prompt, config)
            most = (most * rivals - least * (rivals - 1)).minimum(prompt.block_ids().int() + 1)
            keep = torch.stack([keep, least])
        self._most = most
        self._host = keep.flatten().pin_memory() if device.type == "cuda" else keep.flatten()
        self._device = device
        self._widths: dict[BlockGrid, int] = {}
        self._copies: dict[int, Tensor] = {}  # by stream

    def width(self, grid: BlockGrid) -> int:
        """Bound the blocks that any row of a call keeps."""
        width = self._widths.get(grid)
        if width is None:
            width = self._widths[grid] = int(self._most[..., grid.first_block : grid.k_blocks].max())
        return width

    def on_device(self) -> Tensor:
        """Return the table on the device: copied once a stream, and within a captured graph each time."""
        if self._device.type != "cuda":
            return self._host
        if torch.cuda.is_current_stream_capturing():
            host = _captured.setdefault(tuple(self._host.tolist()), self._host)
            return host.to(self._device, non_blocking=True)
        stream = torch.cuda.current_stream().cuda_stream
        table = self._copies.get(stream)
        if table is None:
            table = self._copies[stream] = self._host.to(self._device, non_blocking=True)
        return table


class SelectionLaunches:
    """All that shapes, strides and the method decide, whatever the budget: sizes and launches.

    Args:
        layout: Shapes of q and k as if not paged, v's head dim, tokens a page or 0, strides of q, k and v, their dtype
            and device, and their addresses modulo 16.
        config: The method.
        logits: How attention makes its logits.
    """

    def __init__(self, layout: tuple[Any, ...], config: StemConfig, logits: Logits) -> None:
        q_shape, k_shape, v_dim, page_size, *strides, dtype, device, _ = layout
        self.grid = grid = BlockGrid(q_shape[2], k_shape[2], config.block_size)
        self.device, self.dtype = device, dtype
        self.cuda = device.type == "cuda" and torch.version.hip is None
        batch, heads, _, dim = q_shape
        self.config, self.kv_heads, self.group = config, k_shape[1], heads // k_shape[1]
        scopes = {"head": 0, "group": 1, "layer": self.kv_heads}
        self.rivals = scopes[config.budget_scope] * self.group
        self.scope = scopes[config.budget_scope] if self.rivals > 1 else 0  # KV heads whose query heads share budgets
        self.rows = batch, heads, grid.q_blocks
        self.all_heads = batch * self.kv_heads
        self.q_rows, self.k_rows = batch * heads * grid.q_blocks, self.all_heads * grid.k_blocks
        self.mass = config.score == "mass"
        per_block = grid.block_size // config.stride
        self.q_stride = config.query_stride if self.mass else config.stride
        self.slots = per_block if self.mass else config.stride
        self.q_slots = grid.block_size // self.q_stride if self.mass else config.stride
        groups = grid.k_len // config.stride
        zscore = config.value_term == "zscore"
        self.valued = config.value_term == "log" or (zscore and groups > 1)  # one group has no deviation
        dim_pad = triton.next_power_of_2(dim)
        spread = self.mass and config.spread_weight > 0
        self.dim_out = triton.cdiv(dim + (dim + 1) // 2 if spread else dim, 8) * 8  # rows of whole 16 bytes
        self.pooled_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        self.logs_size = self.k_rows * per_block
        self.pool = Launch(
            pool_kernel,
            (self.q_rows + self.k_rows * (2 if self.valued else 1), 1),
            (
                *strides,
                batch * heads,
                self.all_heads,
                self.group,
                self.kv_heads,
                grid.offset % grid.block_size,
                grid.q_len,
                grid.k_len,
                grid.q_blocks,
                grid.k_blocks,
                config.value_weight,
                config.spread_weight * logits.scale / 4,  # half of the variance, and of the pair of squares
            ),
            {
                "D": dim,
                "DV": v_dim,
                "D_PAD": dim_pad,
                "DV_PAD": triton.next_power_of_2(v_dim),
                "D_OUT": self.dim_out,
                "SPREAD": spread,
                "BLOCK": grid.block_size,
                "STRIDE": config.stride,
                "Q_STRIDE": self.q_stride,
                "RUNS": self.mass,
                # 8 numbers a thread: 16 bytes.
                "TOKENS": min(max(self.slots, POOL_WARPS * 256 // dim_pad), grid.block_size),
                "PAGE": page_size,
                "ZSCORE": zscore and self.valued,
            },
            num_warps=POOL_WARPS,
        )
        self.zscore = None
        if zscore and self.valued:
            self.zscore = Launch(
                zscore_kernel,
                (self.all_heads, 1),
                (self.q_rows + self.k_rows, groups, grid.k_blocks, config.value_weight),
                {"PER_BLOCK": per_block, "CHUNK": 8192 // per_block},
                num_warps=8,
            )
        self.pitch = triton.cdiv(grid.k_blocks, 16) * 16
        # A query block's scores, and its masses: one for every score and run of queries.
        row_bytes = 4 * self.all_heads * self.group * self.pitch * (1 + self.q_slots if self.mass else 1)
        passes = triton.cdiv(grid.q_blocks, max(SCORE_BYTES // row_bytes, 1))
        pass_rows = triton.cdiv(grid.q_blocks, passes)
        self.scores_size = self.all_heads * self.group * pass_rows * self.pitch
        self.hopper = None
        if self.mass:
            if gluon_runs_on(device) and self.pooled_dtype == torch.float16:
                self.hopper = choose_hopper_mass_tile(triton.cdiv(self.dim_out, 64), self.slots)
            self.step = 32 if 0 < self.dim_out % 64 <= 32 else 64
            depth = triton.cdiv(self.dim_out, self.step) * self.step
            self.tile = choose_mass_tile(depth, self.slots, self.q_slots, self.pooled_dtype.itemsize)
        else:
            self.tile = choose_score_tile(self.all_heads, pass_rows * self.group, grid.k_blocks, dtype.itemsize)
            depth = max(triton.next_power_of_2(self.slots * self.dim_out), 16)
            self.step = min(depth, 64 if self.pooled_dtype == torch.float16 else 16)
        self.passes: list[list[tuple[Launch, tuple[str, ...]]]] = []
        for first in range(0, grid.q_blocks, pass_rows):
            rows = min(pass_rows, grid.q_blocks - first)
            score = self._score_by_mass(first, rows, logits) if self.mass else self._score_by_mean(first, rows, logits)
            self.passes.append([*score, *self._keep_best(first, rows)])

    def _score_by_mean(self, first: int, rows: int, logits: Logits) -> list[tuple[Launch, tuple[str, ...]]]:
        """Plan the linear scores of some query blocks: each launch with its tensors by name."""
        grid, (side, _, warps, stages) = self.grid, self.tile
        rows *= self.group
        cap = 1.0 if logits.softcap is None else logits.softcap
        score = Launch(
            score_kernel,
            (triton.cdiv(rows, side) * triton.cdiv(grid.k_blocks, side), self.all_heads),
            (
                logits.scale / self.config.stride / cap,
                cap,
                first * self.group,
                rows,
                self.group * grid.q_blocks,
                self.group,
                grid.k_blocks,
                grid.first_block,
                self.pitch,
            ),
            {
                "DEPTH": self.slots * self.dim_out,
                "TILE": side,
                "STEP": self.step,
                "VALUES": self.valued,
                "TANH": logits.tanh(self.dtype, self.device),
            },
            num_warps=warps,
            num_stages=stages,
        )
        return [(score, ("q_tiles", "table", "scores"))]

    def _score_by_mass(self, first: int, rows: int, logits: Logits) -> list[tuple[Launch, tuple[str, ...]]]:
        """Plan the mass scores of some query blocks."""
        grid = self.grid
        runs = rows * self.group * self.q_slots
        numbers = (
            logits.factor,
            logits.cap,
            first,
            rows,
            self.group,
            self.kv_heads,
            grid.q_blocks,
            grid.offset,
            grid.k_len,
            grid.k_blocks,
            grid.first_block,
            self.pitch,
        )
        constants = {
            "BLOCK": grid.block_size,
            "STRIDE": self.config.stride,
            "Q_STRIDE": self.q_stride,
            "DEPTH": self.dim_out,
            "VALUES": self.valued,
            "SINKS": logits.sinks is not None,
            "TANH": logits.tanh(self.dtype, self.device),
        }
        if self.hopper is not None:
            from stem_attn.backends.triton.hopper_mass_kernel import hopper_mass_kernel

            tile = self.hopper
            constants |= {"CONSUMERS": tile.consumers, "COLUMNS": tile.columns, "STAGES": tile.stages}
            mass = Launch(
                hopper_mass_kernel,
                (triton.cdiv(runs, 64 * tile.consumers), self.all_heads),
                numbers,
                constants | {"REGISTERS": tile.registers},
                num_warps=4,
                maxnreg=tile.launch_registers,
            )
        else:
            side, columns, warps, stages = self.tile
            constants |= {"STEP": self.step, "ROWS": side, "COLUMNS": columns}
            constants |= {"CHUNK": 4 * warps, "CUDA": self.cuda}  # 16 numbers a thread
            grid_shape = triton.cdiv(runs, side), self.all_heads
            mass = Launch(mass_kernel, grid_shape, numbers, constants, num_warps=warps, num_stages=stages)
        return [(mass, ("q_tiles", "k_tiles", "table", "sinks", "masses", "scores"))]

    def _keep_best(self, first: int, rows: int) -> list[tuple[Launch, tuple[str, ...]]]:
        """Plan what heads keep of some query blocks, and where they share budgets, how many of them first."""
        inside = self.config.forced_blocks == "inside"
        names = ("scores", "keep", "indices", "counts", "keep_stride", "width")
        alone = (self._take_top(first, rows, inside, shared=False), names)
        if self.scope:
            if triton.next_power_of_2(self.scope * self.group) * triton.next_power_of_2(self.pitch) <= CHOOSE_KEYS:
                names = ("scores", "keep", "indices", "counts", "keep_stride", "least_at", "width")
                shared = [(self._choose(first, rows, inside), names)]
            else:
                share = (self._share(first, rows, inside), ("scores", "keep", "counts", "keep_stride", "least_at"))
                shared = [share, (self._take_top(first, rows, True, shared=True), names)]
            # How many blocks a head keeps alone depends on its scores where forced ones come on top.
            return shared if inside else [alone, *shared]
        return [alone]

    def _choose(self, first: int, rows: int, inside: bool) -> Launch:
        grid, config = self.grid, self.config
        heads, columns = triton.next_power_of_2(self.scope * self.group), triton.next_power_of_2(self.pitch)
        inner = min(columns, 128)
        return Launch(
            choose_kernel,
            (rows, self.all_heads // self.scope),
            (
                first,
                self.group,
                self.kv_heads,
                self.scope,
                grid.q_blocks,
                grid.first_block,
                self.pitch,
                config.sink_blocks,
                config.local_blocks,
            ),
            {
                "HEADS": heads,
                "OUTER": columns // inner,
                "INNER": inner,
                "INSIDE": inside,
                "NORMALISE": not self.mass,
                "CUDA": self.cuda,
            },
            num_warps=min(max(heads * columns // 1024, 4), 16),
        )

    def _share(self, first: int, rows: int, inside: bool) -> Launch:
        grid, config = self.grid, self.config
        heads = triton.next_power_of_2(self.scope * self.group)
        return Launch(
            share_kernel,
            (rows, self.all_heads // self.scope),
            (
                first,
                self.group,
                self.kv_heads,
                self.scope,
                grid.q_blocks,
                grid.first_block,
                self.pitch,
                config.sink_blocks,
                config.local_blocks,
            ),
            {
                "HEADS": heads,
                "CHUNK": max(min(SHARE_KEYS // heads, triton.next_power_of_2(self.pitch)), 16),
                "INSIDE": inside,
                "NORMALISE": not self.mass,
            },
            num_warps=8,
        )

    def _take_top(self, first: int, rows: int, inside: bool, *, shared: bool) -> Launch:
        grid, config = self.grid, self.config
        columns = triton.next_power_of_2(self.pitch)
        return Launch(
            top_kernel,
            (rows * self.group, self.all_heads),
            (
                first,
                self.group,
                grid.q_blocks,
                grid.first_block,
                self.pitch,
                config.sink_blocks,
                config.local_blocks,
                self.kv_heads,
            ),
            {"COLUMNS": columns, "INSIDE": inside, "SHARED": shared},
            num_warps=min(max(columns // TOP_KEYS_PER_WARP, 1), 16),
        )

    def run(self, part: Part, call: Call, keep: KeepTable) -> BlockSelection:
        """Make the selection of a part of this layout on the current device and stream."""
        pooled, table = self.pool_inputs(part)
        width = keep.width(self.grid)
        indices = torch.empty((*self.rows, width), dtype=torch.int32, device=self.device)
        counts = torch.empty(self.rows, dtype=torch.int32, device=self.device)
        operands: dict[str, Any] = {
            **self._tiles(pooled),
            "table": table,
            "sinks": sinks_of(call, table),
            "scores": torch.empty(self.scores_size, dtype=torch.float32, device=self.device),
            "keep": keep.on_device(),
            "indices": indices,
            "counts": counts,
            "keep_stride": keep.stride,
            "least_at": keep.least_at,
            "width": width,
        }
        if self.mass:
            masses_size = self.scores_size * self.q_slots
            operands["masses"] = torch.empty(masses_size, dtype=torch.float32, device=self.device)
        for launches in self.passes:
            for launch, names in launches:
                launch(*(operands[name] for name in names))
        return BlockSelection.made(indices, counts, self.grid)

    def _tiles(self, pooled: Tensor) -> dict[str, Any]:
        """Describe the boxes in which kernels read pooled blocks."""
        if self.hopper is not None:
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

            from stem_attn.backends.triton.hopper_mass_kernel import box_layout

            sides = 64, self.hopper.columns
            q_tiles, k_tiles = (
                GluonDescriptor(pooled, pooled.shape, pooled.stride(), [side, 64], box_layout(side)) for side in sides
            )
        else:
            q_tiles, k_tiles = (
                TensorDescriptor(pooled, pooled.shape, pooled.stride(), [side, self.step]) for side in self.tile[:2]
            )
        return {"q_tiles": q_tiles, "k_tiles": k_tiles}

    def pool_inputs(self, part: Part) -> tuple[Tensor, Tensor]:
        """Read a part's q, k and v once.

        Returns:
            pooled, the blocks of q and then those of k: for linear scores [blocks, stride * D], D rounded up to a
            multiple of 8; for masses [runs, D], D half as much again with spreads. And a float32 table: the powers of
            two that these blocks were divided by, then the weighted value term of the k blocks.
        """
        rows = self.q_rows + self.k_rows
        shape = rows, self.slots * self.dim_out
        if self.mass:
            k_blocks = triton.cdiv(self.grid.k_blocks, 4) * 4
            shape = self.q_rows * self.q_slots + self.all_heads * k_blocks * self.slots, self.dim_out
        pooled = torch.empty(shape, dtype=self.pooled_dtype, device=self.device)
        table = torch.empty(rows + self.k_rows, dtype=torch.float32, device=self.device)
        q, k, v = part.q, part.k, part.v
        block_table = table if part.pages is None else part.pages
        if self.zscore is None:
            self.pool(q, k, v, pooled, table, table, block_table)
        else:
            logs = torch.empty(self.logs_size, dtype=torch.float32, device=self.device)
            self.pool(q, k, v, pooled, table, logs, block_table)
            self.zscore(logs, table)
        return pooled, table
