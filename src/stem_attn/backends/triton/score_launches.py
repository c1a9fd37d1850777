"""The launches that score pooled blocks, and the descriptors by which these are read: a class for each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attn.backends.triton.boxes import Boxes
from stem_attn.backends.triton.devices import gluon_runs_on
from stem_attn.backends.triton.launch import Launch
from stem_attn.backends.triton.logits import Logits
from stem_attn.backends.triton.mass_kernels import mass_kernel
from stem_attn.backends.triton.selection_kernels import score_kernel
from stem_attn.backends.triton.selection_sizes import Sizes, Steps
from stem_attn.backends.triton.tiles import (
    HopperMassTile,
    choose_hopper_mass_tile,
    choose_mass_tile,
    choose_score_tile,
)


def scoring(sizes: Sizes, logits: Logits, pass_rows: int) -> LinearScores | MassScores | HopperMassScores:
    """Choose how blocks are scored, at most `pass_rows` query blocks at once."""
    if not sizes.mass:
        return LinearScores(sizes, logits, pass_rows)
    if gluon_runs_on(sizes.device) and sizes.pooled_dtype == torch.float16:
        tile = choose_hopper_mass_tile(triton.cdiv(sizes.dim_out, 64), sizes.slots)
        if tile is not None:
            return HopperMassScores(sizes, logits, tile)
    return MassScores(sizes, logits)


class LinearScores:
    """A product of matrices: means by position modulo the stride."""

    def __init__(self, sizes: Sizes, logits: Logits, pass_rows: int) -> None:
        self._sizes, self._logits = sizes, logits
        rows = pass_rows * sizes.group
        self._tile = choose_score_tile(sizes.all_heads, rows, sizes.grid.k_blocks, sizes.dtype.itemsize)
        depth = max(triton.next_power_of_2(sizes.slots * sizes.dim_out), 16)
        self._step = min(depth, 64 if sizes.pooled_dtype == torch.float16 else 16)

    def launches(self, first: int, rows: int) -> Steps:
        """Plan the scores of `rows` query blocks from `first` on."""
        sizes, logits, (side, _, warps, stages) = self._sizes, self._logits, self._tile
        grid = sizes.grid
        rows *= sizes.group
        cap = 1.0 if logits.softcap is None else logits.softcap
        score = Launch(
            score_kernel,
            (triton.cdiv(rows, side) * triton.cdiv(grid.k_blocks, side), sizes.all_heads),
            (
                logits.scale / sizes.config.stride / cap,
                cap,
                first * sizes.group,
                rows,
                sizes.group * grid.q_blocks,
                sizes.group,
                grid.k_blocks,
                grid.first_block,
                sizes.pitch,
            ),
            {
                "DEPTH": sizes.slots * sizes.dim_out,
                "TILE": side,
                "STEP": self._step,
                "VALUES": sizes.valued,
                "TANH": logits.tanh(sizes.dtype, sizes.device),
            },
            num_warps=warps,
            num_stages=stages,
        )
        return [(score, ("q_tiles", "table", "scores"))]

    def describe(self, pooled: Tensor) -> dict[str, Any]:
        """Describe the boxes in which the kernel reads pooled blocks."""
        return {"q_tiles": TensorDescriptor(pooled, pooled.shape, pooled.stride(), [self._tile[0], self._step])}


class MassScores:
    """Masses of means of runs, by the portable kernel."""

    def __init__(self, sizes: Sizes, logits: Logits) -> None:
        self._sizes, self._logits = sizes, logits
        self._step = 32 if 0 < sizes.dim_out % 64 <= 32 else 64
        depth = triton.cdiv(sizes.dim_out, self._step) * self._step
        self._tile = choose_mass_tile(depth, sizes.slots, sizes.q_slots, sizes.pooled_dtype.itemsize)

    def launches(self, first: int, rows: int) -> Steps:
        """Plan the scores of `rows` query blocks from `first` on."""
        sizes, (side, columns, warps, stages) = self._sizes, self._tile
        constants = _mass_constants(sizes, self._logits)
        constants |= {"STEP": self._step, "ROWS": side, "COLUMNS": columns}
        constants |= {"CHUNK": 4 * warps, "CUDA": sizes.cuda}  # 16 numbers a thread
        grid = triton.cdiv(rows * sizes.group * sizes.q_slots, side), sizes.all_heads
        numbers = _mass_numbers(sizes, self._logits, first, rows)
        options = {"num_warps": warps, "num_stages": stages}
        mass = Launch(mass_kernel, grid, numbers, constants, **sizes.chain(options))
        return [(mass, _MASS_TENSORS)]

    def describe(self, pooled: Tensor) -> dict[str, Any]:
        """Describe the boxes in which the kernel reads pooled blocks."""
        q_tiles, k_tiles = (
            TensorDescriptor(pooled, pooled.shape, pooled.stride(), [side, self._step]) for side in self._tile[:2]
        )
        return {"q_tiles": q_tiles, "k_tiles": k_tiles}


class HopperMassScores:
    """Masses of means of runs, by the Hopper kernel."""

    def __init__(self, sizes: Sizes, logits: Logits, tile: HopperMassTile) -> None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        from stem_attn.backends.triton.hopper_mass_kernel import box_layout

        def boxes(side: int) -> Boxes:
            layout = box_layout(side)
            return Boxes(lambda pooled: GluonDescriptor.from_tensor(pooled, [side, 64], layout))

        self._sizes, self._logits, self._tile = sizes, logits, tile
        self._q_tiles, self._k_tiles = boxes(64), boxes(tile.columns)

    def launches(self, first: int, rows: int) -> Steps:
        """Plan the scores of `rows` query blocks from `first` on."""
        from stem_attn.backends.triton.hopper_mass_kernel import hopper_mass_kernel

        sizes, tile = self._sizes, self._tile
        constants = _mass_constants(sizes, self._logits)
        constants |= {"COLUMNS": tile.columns, "STAGES": tile.stages}
        grid = triton.cdiv(rows * sizes.group * sizes.q_slots, 128), sizes.all_heads
        numbers = _mass_numbers(sizes, self._logits, first, rows)
        options = {"num_warps": 4, "maxnreg": 168}  # 384 threads share 64 Ki registers; the kernel deals them out anew
        mass = Launch(hopper_mass_kernel, grid, numbers, constants, **sizes.chain(options))
        return [(mass, _MASS_TENSORS)]

    def describe(self, pooled: Tensor) -> dict[str, Any]:
        """Describe the boxes in which the kernel reads pooled blocks."""
        return {"q_tiles": self._q_tiles.of(pooled), "k_tiles": self._k_tiles.of(pooled)}


_MASS_TENSORS = ("q_tiles", "k_tiles", "table", "sinks", "masses", "scores")


def _mass_numbers(sizes: Sizes, logits: Logits, first: int, rows: int) -> tuple[Any, ...]:
    """Return the numbers that both mass kernels take."""
    grid = sizes.grid
    return (
        logits.factor,
        logits.cap,
        first,
        rows,
        sizes.group,
        sizes.kv_heads,
        grid.q_blocks,
        grid.offset,
        grid.k_len,
        grid.k_blocks,
        grid.first_block,
        sizes.pitch,
    )


def _mass_constants(sizes: Sizes, logits: Logits) -> dict[str, Any]:
    """Return the constants that both mass kernels take."""
    return {
        "BLOCK": sizes.grid.block_size,
        "STRIDE": sizes.config.stride,
        "Q_STRIDE": sizes.q_stride,
        "DEPTH": sizes.dim_out,
        "VALUES": sizes.valued,
        "SINKS": logits.sinks is not None,
        "TANH": logits.tanh(sizes.dtype, sizes.device),
        "CHAINED": sizes.chained,
    }
