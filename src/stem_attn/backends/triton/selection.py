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
    return _launches(layout, without_budget(config), Logits.of(call, call.scale))


@lru_cache(maxsize=256)
def _launches(layout: tuple[Any, ...], config: StemConfig, logits: Logits) -> SelectionLaunches:
    return SelectionLaunches(layout, config, logits)


@lru_cache(maxsize=1024)
def without_budget(config: StemConfig) -> StemConfig:
    """Return a config with the defaults of what only budgets read, and what attention is asked for."""
    defaults = StemConfig()
    plain = dataclasses.replace(config, **{name: getattr(defaults, name) for name in _BUDGET_FIELDS})
    return _interned.setdefault(plain, plain)


_interned: dict[StemConfig, StemConfig] = {}  # equal ones are the same object


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
        self.grid, self.rivals = sizes.grid, sizes.rivals
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
        width = keep.width(sizes.grid)
        operands = self.operands(
            {
                name: torch.empty(shape, dtype=dtype, device=sizes.device)
                for name, (shape, dtype) in self.buffers(width).items()
            }
        )
        self.pool(part.q, part.k, part.v, part.pages, operands)
        self.choose(call.sinks, keep, operands)
        return BlockSelection.made(operands["indices"], operands["counts"], sizes.grid)

    def buffers(self, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of all that the launches write.

        Returns:
            pooled, the blocks of q and then those of k: for linear scores [blocks, stride * D], D rounded up to a
            multiple of 8; for masses [runs, D], D half as much again with spreads, and the runs of four blocks of k
            dealt out in pairs. The table: the powers of two that these blocks were divided by, then the weighted value
            term of the k blocks. What scores are made from, the scores of one pass, and a selection's indices, of
            `width` slots a row, and counts.
        """
        sizes = self._sizes
        rows = sizes.batch, sizes.heads, sizes.grid.q_blocks
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "pooled": (sizes.pooled_shape, sizes.pooled_dtype),
            "table": ((sizes.q_rows + 2 * sizes.k_rows,), torch.float32),
            "scores": ((self._scores_size,), torch.float32),
            "indices": ((*rows, width), torch.int32),
            "counts": (rows, torch.int32),
        }
        if sizes.mass:
            found["masses"] = (self._scores_size * sizes.q_slots,), torch.float32
        if self._zscore is not None:
            found["logs"] = (sizes.k_rows * sizes.per_block,), torch.float32
        return found

    def operands(self, buffers: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the launches are given by name: the buffers, and the boxes in which pooled blocks are read."""
        return {**buffers, **self._scoring.describe(buffers["pooled"]), "width": buffers["indices"].shape[3]}

    def pool(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor | None,
        operands: dict[str, Any],
        stream: int | None = None,
    ) -> None:
        """Read a part's q, k and v once; see `Part` for what they are, and `buffers` for what is written."""
        pooled, table = operands["pooled"], operands["table"]
        logs, pages = operands.get("logs", table), table if pages is None else pages
        self._pool(q, k, v, pooled, table, logs, pages, stream=stream)
        if self._zscore is not None:
            self._zscore(logs, table, stream=stream)

    def choose(
        self, sinks: Tensor | None, keep: KeepTable, operands: dict[str, Any], stream: int | None = None
    ) -> None:
        """Score the pooled blocks, and write the kept ones."""
        operands = {
            **operands,
            "sinks": sinks_of(sinks, operands["table"]),
            "keep": keep.on_device(),
            "keep_stride": keep.stride,
            "least_at": keep.least_at,
        }
        for launches in self.passes:
            for launch, names in launches:
                launch(*[operands[name] for name in names], stream=stream)
