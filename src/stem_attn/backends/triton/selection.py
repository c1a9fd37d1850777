"""Make a selection on the GPU: a few launches, nothing asked back from the device.

One pass over q, k and v pools them (and measures v); matrix products score block pairs; one program a row keeps the
best, of one head, or of all heads that share budgets. Scores of many query blocks are made and used in passes, so that
their memory stays bounded. Every layer of a model asks for the same shapes, so all that follows from shapes is worked
out once.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from stem_attn.backends.triton.keep_table import KeepTable, keep_table
from stem_attn.backends.triton.launch import on_device
from stem_attn.backends.triton.logits import Logits, sinks_of
from stem_attn.backends.triton.pick_launches import pick_launches
from stem_attn.backends.triton.pool_launches import pool_launch, zscore_launch
from stem_attn.backends.triton.score_launches import scoring
from stem_attn.backends.triton.selection_sizes import Sizes, Steps
from stem_attn.blocks import BlockSelection
from stem_attn.budget import Budget
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part

SCORE_BYTES = 1 << 30
"""Memory that the scores of one pass may take, and the masses that they are made from."""

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
    "precision",
)


def select(call: Call, part: Part, config: StemConfig, budget: Budget) -> BlockSelection:
    """Choose the kept blocks of a part; see `Backend.select`.

    Returns:
        The selection that the CPU backend makes, except where scores differ by less than their rounding. 16-bit
        inputs are pooled in float32 and multiplied with 11 significant bits.
    """
    if call.scale < 0:  # the largest of a few logits is sought before they are scaled
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
        self._sizes = sizes = Sizes(q_shape, k_shape, dtype, device, config)
        self.rivals = sizes.rivals
        self._pool = pool_launch(sizes, strides, v_dim, page_size, logits.scale)
        self._zscore = zscore_launch(sizes)
        # A query block's scores, and its masses: one for every score and run of queries.
        columns = sizes.batch * sizes.heads * sizes.pitch
        row_bytes = 4 * columns * (1 + sizes.q_slots if sizes.mass else 1)
        q_blocks = sizes.grid.q_blocks
        passes = triton.cdiv(q_blocks, max(SCORE_BYTES // row_bytes, 1))
        pass_rows = triton.cdiv(q_blocks, passes)
        self._scores_size = columns * pass_rows
        self._scoring = scoring(sizes, logits, pass_rows)
        self.passes: list[Steps] = []
        for first in range(0, q_blocks, pass_rows):
            rows = min(pass_rows, q_blocks - first)
            self.passes.append([*self._scoring.launches(first, rows), *pick_launches(sizes, first, rows)])

    def run(self, part: Part, call: Call, keep: KeepTable) -> BlockSelection:
        """Make the selection of a part of this layout on the current device and stream."""
        sizes = self._sizes
        pooled, table = self.pool_inputs(part)
        width = keep.width(sizes.grid)
        rows = sizes.batch, sizes.heads, sizes.grid.q_blocks
        indices = torch.empty((*rows, width), dtype=torch.int32, device=sizes.device)
        counts = torch.empty(rows, dtype=torch.int32, device=sizes.device)
        operands: dict[str, Any] = {
            **self._scoring.describe(pooled),
            "table": table,
            "sinks": sinks_of(call, table),
            "scores": torch.empty(self._scores_size, dtype=torch.float32, device=sizes.device),
            "keep": keep.on_device(),
            "indices": indices,
            "counts": counts,
            "keep_stride": keep.stride,
            "least_at": keep.least_at,
            "width": width,
        }
        if sizes.mass:
            masses_size = self._scores_size * sizes.q_slots
            operands["masses"] = torch.empty(masses_size, dtype=torch.float32, device=sizes.device)
        for launches in self.passes:
            for launch, names in launches:
                launch(*(operands[name] for name in names))
        return BlockSelection.made(indices, counts, sizes.grid)

    def pool_inputs(self, part: Part) -> tuple[Tensor, Tensor]:
        """Read a part's q, k and v once.

        Returns:
            pooled, the blocks of q and then those of k: for linear scores [blocks, stride * D], D rounded up to a
            multiple of 8; for masses [runs, D], D half as much again with spreads, and the runs of four blocks of k
            dealt out in pairs. And a float32 table: the powers of two that these blocks were divided by, then the
            weighted value term of the k blocks.
        """
        sizes = self._sizes
        rows = sizes.q_rows + sizes.k_rows
        pooled = torch.empty(sizes.pooled_shape, dtype=sizes.pooled_dtype, device=sizes.device)
        table = torch.empty(rows + sizes.k_rows, dtype=torch.float32, device=sizes.device)
        q, k, v = part.q, part.k, part.v
        block_table = table if part.pages is None else part.pages
        if self._zscore is None:
            self._pool(q, k, v, pooled, table, table, block_table)
        else:
            logs = torch.empty(sizes.k_rows * sizes.per_block, dtype=torch.float32, device=sizes.device)
            self._pool(q, k, v, pooled, table, logs, block_table)
            self._zscore(logs, table)
        return pooled, table
