"""A paged call that is made in layer after layer: what only the first of them has to work out.

The layers of a model ask for the same, of other tensors and with budgets of other scales. A server's steps are short,
and the device must not wait for the host: so lengths are checked and launches found once a step, and what kernels write
for one another lies in memory that the layers share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stem_attn.backends.triton.attention import (
    AttentionLaunch,
    Operands,
    goes_in_one,
    hopper_fits,
    hopper_launch,
    packing_of,
    portable_launch,
    portable_tile,
    rows_of,
)
from stem_attn.backends.triton.keep_table import KeepTable, keep_table
from stem_attn.backends.triton.launch import on_device, stream_of
from stem_attn.backends.triton.selection import SelectionLaunches, launches_for, without_budget
from stem_attn.blocks import BlockSelection
from stem_attn.budget import budget_of
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part

_ALIGNED = 256
"""Bytes: buffers in shared memory start at a multiple of it, as torch's own do."""


def prepare(call: Call, config: StemConfig, out: Tensor) -> PreparedCall | None:
    """Prepare a call to be made again; see `Backend.prepare`."""
    if call.layout.block_table is None or not _plain(config) or call.scale <= 0 or call.q.stride(3) != 1:
        return None
    fits = hopper_fits(call.q, call.k, call.v, call.block_size, call.layout.page_size)
    if goes_in_one(call, fits) or _capturing(call.q.device):
        return None
    return PreparedCall(call, config, out, fits)


class PreparedCall:
    """See `Backend.prepare`. Nothing of the first call's tensors is kept.

    Args:
        call: Paged, and made before.
        config: The method.
        out: [B, Hq, T, Dv].
        fits: Whether the Hopper kernel takes it.
    """

    def __init__(self, call: Call, config: StemConfig, out: Tensor, fits: bool) -> None:
        self._device, self._stream = call.q.device, stream_of(call.q.device)
        self._config = without_budget(config)
        found = []
        for part in call.parts:
            launches, budget = launches_for(call, part, config), budget_of(config, part.prompt_lens)
            tables = keep_table(budget, launches.rivals, self._device).tables
            width = max(tables.widths(launches.grid))  # of all layers: they share a launch of attention
            whole = any(budget.of_layers.keep_everything(launches.grid))
            found.append((part, launches, launches.buffers(width), whole))
        size = max(sum(_bytes(*buffer) for buffer in buffers.values()) for _, _, buffers, _ in found)
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._parts = [
            PreparedPart.of(call, part, launches, _carve(memory, buffers), out[:, :, part.tokens], fits, whole)
            for part, launches, buffers, whole in found
        ]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, config: StemConfig
    ) -> list[Tensor] | None:
        """See `PreparedCall` of `backends.base`."""
        here = stream_of(self._device) == self._stream and not _capturing(self._device)
        if not here or not _plain(config) or without_budget(config) is not self._config:
            return None
        kept = [part.kept(config, self._device) for part in self._parts]
        if None in kept:
            return None
        with on_device(self._device):
            return [
                part.run(q, k, v, sinks, out, keep, self._stream)
                for part, keep in zip(self._parts, kept, strict=True)
                if keep is not None
            ]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPart:
    """One sequence of a prepared call.

    Args:
        tokens: Where its queries lie among the call's.
        prompt_lens: Tokens of its whole prompt.
        pages: int32, its row of the block table.
        launches: Of its selection.
        operands: What they are given, but for a layer's tensors, budget and counts.
        attention: Its launch.
        everything: The launch, the indices and the counts of layers that keep all; None: there are none.
        block_table: By which attention reads pages; see `Operands`, as for the next.
        packing: Likewise.
    """

    tokens: slice
    prompt_lens: tuple[int, ...]
    pages: Tensor
    launches: SelectionLaunches
    operands: dict[str, Any]
    attention: AttentionLaunch
    everything: tuple[AttentionLaunch, Tensor, Tensor] | None
    block_table: Tensor
    packing: tuple[Tensor, ...] | None

    @classmethod
    def of(
        cls,
        call: Call,
        part: Part,
        launches: SelectionLaunches,
        buffers: dict[str, Tensor],
        out: Tensor,
        hopper: bool,
        whole: bool,
    ) -> PreparedPart:
        """Find the launches of attention.

        Args:
            call: The first call.
            part: One of its parts.
            launches: Of the part's selection.
            buffers: What they write.
            out: [B, Hq, Tq, Dv], the part's own.
            hopper: Whether attention runs on the Hopper kernel.
            whole: Whether there are layers that keep everything.
        """
        assert part.pages is not None
        q, k, v, (batch, heads) = part.q, part.k, part.v, part.q.shape[:2]
        packing, block_table = (None, part.pages) if hopper else (packing_of(call, [part]), part.pages[None])

        def find(indices: Tensor, counts: Tensor) -> AttentionLaunch:
            x = Operands(call, q, k, v, call.scale, indices, counts, out, None, part.k_len, block_table, packing)
            tile = portable_tile(q, v, call.block_size)
            found = hopper_launch(x, counts) if hopper else portable_launch(x, counts, tile)
            found.describe(q, k, v)  # of later tensors the addresses are enough
            return found

        everything = None
        if whole:
            grid, device = launches.grid, q.device
            selection = BlockSelection.everything(batch=batch, heads=heads, grid=grid, device=device)
            rows = rows_of(selection), selection.counts
            everything = find(*rows), *rows
        attention, operands = find(buffers["indices"], buffers["counts"]), launches.operands(buffers)
        places = part.tokens, part.prompt_lens, part.pages
        return cls(*places, launches, operands, attention, everything, block_table, packing)

    def kept(self, config: StemConfig, device: torch.device) -> KeepTable | Literal["everything"] | None:
        """Return what a layer may keep; None: more than there is room for."""
        budget, grid = budget_of(config, self.prompt_lens), self.launches.grid
        if budget.keeps_everything(grid):
            return None if self.everything is None else "everything"
        keep = keep_table(budget, self.launches.rivals, device)
        return keep if keep.width(grid) <= self.operands["width"] else None

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        kept: KeepTable | Literal["everything"],
        stream: int | None,
    ) -> Tensor:
        """Select and attend; return the counts. The tensors are those of `PreparedCall.run`."""
        q, out = q[self.tokens], out[self.tokens]
        if kept == "everything":
            assert self.everything is not None
            attention, indices, counts = self.everything
        else:
            attention, counts = self.attention, torch.empty_like(self.operands["counts"])
            operands = {**self.operands, "counts": counts}
            indices = operands["indices"]
            self.launches.pool(q, k, v, self.pages, operands, stream)
            self.launches.choose(sinks, kept, operands, stream)
        places: dict[str, Any] = {"block_table": self.block_table, "packing": self.packing}
        attention.run(q, k, v, out, indices, counts, **places, sinks=sinks, stream=stream)
        return counts


def _plain(config: StemConfig) -> bool:
    """Tell whether attention is over the kept blocks alone, in the inputs' precision."""
    return config.residual == "none" and config.precision == "auto"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED


def _carve(memory: Tensor, buffers: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Make buffers one after the other in memory, uint8 [n]."""
    found, taken = {}, 0
    for name, (shape, dtype) in buffers.items():
        size = math.prod(shape) * dtype.itemsize
        found[name] = memory[taken : taken + size].view(dtype).view(shape)
        taken += _bytes(shape, dtype)
    return found
