"""A paged call that is made in layer after layer: what only the first of them has to work out.

The layers of a model ask for the same, of other tensors and with budgets of other scales. A server's steps are short,
and the device must not wait for the host: so lengths are checked and launches found once a step, and what kernels write
for one another lies in memory that the layers share.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

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
)
from stem_attn.backends.triton.keep_table import KeepTable, keep_table
from stem_attn.backends.triton.launch import on_device, stream_of
from stem_attn.backends.triton.selection import SelectionLaunches, launches_for, without_budget
from stem_attn.budget import budget_of
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part

_ALIGNED = 256
"""Bytes: buffers in shared memory start at a multiple of it, as torch's own do."""


def prepare(call: Call, config: StemConfig) -> PreparedCall | None:
    """Prepare a call to be made again; see `Backend.prepare`."""
    plain = call.layout.block_table is not None and call.residual == "none" and call.precision == "auto"
    if not plain or call.scale <= 0 or call.q.stride(3) != 1 or _capturing(call.q.device):
        return None
    fits = hopper_fits(call.q, call.k, call.v, call.block_size, call.layout.page_size)
    return None if goes_in_one(call, fits) else PreparedCall(call, config, fits)


class PreparedCall:
    """See `Backend.prepare`.

    Args:
        call: Paged, and made before.
        config: The method.
        fits: Whether the Hopper kernel takes it.
    """

    def __init__(self, call: Call, config: StemConfig, fits: bool) -> None:
        self._call, self._device = call, call.q.device
        self._config, self._stream = without_budget(config), stream_of(call.q.device)
        found = []
        for part in call.parts:
            launches = launches_for(call, part, config)
            tables = keep_table(budget_of(config, part.prompt_lens), launches.rivals, self._device).tables
            width = max(tables.widths(call.grid(part)))  # of all layers: they share a launch of attention
            found.append((part, launches, launches.buffers(width)))
        size = max(_carved(buffers) for _, _, buffers in found)
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._parts = [
            PreparedPart.of(call, part, launches, _carve(memory, buffers), fits) for part, launches, buffers in found
        ]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, config: StemConfig
    ) -> list[Tensor] | None:
        """See `PreparedCall` of `backends.base`."""
        here = stream_of(self._device) == self._stream and not _capturing(self._device)
        if not here or without_budget(config) is not self._config:
            return None
        keeps = [part.keep(config, self._device) for part in self._parts]
        if None in keeps:
            return None
        call = self._call if sinks is None else dataclasses.replace(self._call, sinks=sinks)
        with on_device(self._device):
            return [
                part.run(call, q, k, v, out, keep, self._stream)
                for part, keep in zip(self._parts, keeps, strict=True)
                if keep is not None
            ]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPart:
    """One sequence of a prepared call.

    Args:
        part: The sequence, with the first call's tensors.
        launches: Of its selection.
        operands: What they are given, but for q, k, v, counts and a layer's budget.
        attention: Its launch.
        pages: What attention reads pages by; see `Operands`, as for the next.
        packing: Likewise.
    """

    part: Part
    launches: SelectionLaunches
    operands: dict[str, Any]
    attention: AttentionLaunch
    pages: Tensor | None
    packing: tuple[Tensor, ...] | None

    @classmethod
    def of(
        cls, call: Call, part: Part, launches: SelectionLaunches, buffers: dict[str, Tensor], hopper: bool
    ) -> PreparedPart:
        """Find the launch of attention."""
        packing = None if hopper else packing_of(call, [part])
        assert part.pages is not None
        pages = part.pages if hopper else part.pages[None]
        rows = buffers["indices"], buffers["counts"]
        out = call.new_output()[:, :, part.tokens]
        x = Operands(call, part.q, part.k, part.v, call.scale, *rows, out, None, part.k_len, pages, packing)
        tile = portable_tile(x.q, x.v, call.block_size)
        attention = hopper_launch(x, x.counts) if hopper else portable_launch(x, x.counts, tile)
        attention.describe(x)  # of later tensors the addresses are enough
        return cls(part, launches, launches.operands(buffers), attention, pages, packing)

    def keep(self, config: StemConfig, device: torch.device) -> KeepTable | None:
        """Return what a layer may keep; None: everything, or more than there is room for."""
        budget, grid = budget_of(config, self.part.prompt_lens), self.launches.grid
        if budget.keeps_everything(grid):
            return None
        keep = keep_table(budget, self.launches.rivals, device)
        return keep if keep.width(grid) <= self.operands["width"] else None

    def run(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, keep: KeepTable, stream: int | None
    ) -> Tensor:
        """Select and attend; return the counts."""
        part, tokens = self.part, self.part.tokens
        counts = torch.empty_like(self.operands["counts"])
        operands = {**self.operands, "counts": counts}
        q, out = q[tokens], out[tokens]
        self.launches.pool(q, k, v, part.pages, operands, stream)
        self.launches.choose(call.sinks, keep, operands, stream)
        rows = operands["indices"], counts
        x = Operands(call, q, k, v, call.scale, *rows, out, None, part.k_len, self.pages, self.packing)
        self.attention.run(x, counts, stream)
        return counts


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _carved(buffers: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return the bytes that `_carve` takes."""
    return sum(_bytes(*buffer) for buffer in buffers.values())


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
