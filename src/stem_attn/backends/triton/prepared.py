"""A paged call that is made in layer after layer: what only the first of them has to work out.

The layers of a model ask for the same, of other tensors and with budgets of other scales. A server's steps are short,
and the device must not wait for the host: so what the first layer has checked is not checked again, launches are found
once a step, and what kernels write for one another lies in memory that the layers share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_attn.backends.triton.attention import goes_in_one, hopper_fits, packing_of, rows_of
from stem_attn.backends.triton.attention_launches import AttentionLaunch, Operands, find_hopper, find_portable
from stem_attn.backends.triton.keep_table import KeepTable, keep_table, keep_tables
from stem_attn.backends.triton.launch import is_captured, on_device, stream_of
from stem_attn.backends.triton.selection import SelectionLaunches, launches_for, without_budget
from stem_attn.blocks import BlockSelection
from stem_attn.budget import budget_of, budgets_of_layers
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part

_ALIGNED = 256
"""Bytes: buffers in shared memory start at a multiple of it, as torch's own do."""

Whole = tuple[AttentionLaunch, Tensor, Tensor]
"""The launch, the indices and the counts of a layer that keeps everything."""


def prepare(call: Call, config: StemConfig, out: Tensor) -> TritonPreparedCall | None:
    """Prepare a call to be made again; see `Backend.prepare`."""
    if call.layout.block_table is None or not _plain(config) or call.scale <= 0 or call.q.stride(3) != 1:
        return None
    fits = hopper_fits(call.q, call.k, call.v, call.block_size, call.layout.page_size)
    if goes_in_one(call, fits) or is_captured(call.q.device):
        return None
    return TritonPreparedCall(call, config, out, fits)


class TritonPreparedCall:
    """See `backends.base.PreparedCall`. None of the call's tensors but its block table is kept.

    Args:
        call: Paged, and checked.
        config: The method.
        out: [B, Hq, T, Dv].
        fits: Whether the Hopper kernel takes it.
    """

    def __init__(self, call: Call, config: StemConfig, out: Tensor, fits: bool) -> None:
        self._device, self._stream = call.q.device, stream_of(call.q.device)
        self._config = without_budget(config)
        found = []
        for part in call.parts:
            launches = launches_for(call, part, config)
            # Layers share a launch of attention, and so the width of all that prune and are known by now.
            widths: list[int] = []
            whole: list[bool] = []
            for made in budgets_of_layers(config, part.prompt_lens):
                widths += keep_tables(made, launches.rivals, self._device)[0].tables.widths(launches.grid)
                whole += made.keep_everything(launches.grid)
            width = max((width for width, all_of_it in zip(widths, whole, strict=True) if not all_of_it), default=1)
            found.append((part, launches, launches.buffers(width), any(whole)))
        size = max(sum(_bytes(*buffer) for buffer in buffers.values()) for _, _, buffers, _ in found)
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._parts = [
            PreparedPart.of(call, part, launches, _carve(memory, buffers), out[:, :, part.tokens], fits, some_whole)
            for part, launches, buffers, some_whole in found
        ]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, config: StemConfig
    ) -> list[Tensor] | None:
        """See `backends.base.PreparedCall.run`."""
        here = stream_of(self._device) == self._stream and not is_captured(self._device)
        if not here or not _plain(config) or without_budget(config) is not self._config:
            return None
        choices = []
        for part in self._parts:
            choice = part.choice(config, self._device)
            if choice is None:
                return None
            choices.append(choice)
        with on_device(self._device):
            return [
                part.run(q, k, v, sinks, out, choice, self._stream)
                for part, choice in zip(self._parts, choices, strict=True)
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
        whole: Likewise, of layers that keep everything; None where no such layer is known.
        block_table: By which attention reads pages; see `Operands`, as for the next.
        packing: Likewise.
    """

    tokens: slice
    prompt_lens: tuple[int, ...]
    pages: Tensor
    launches: SelectionLaunches
    operands: dict[str, Any]
    attention: AttentionLaunch
    whole: Whole | None
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
        some_whole: bool,
    ) -> PreparedPart:
        """Find the launches of attention.

        Args:
            call: The call.
            part: One of its parts.
            launches: Of the part's selection.
            buffers: What they write.
            out: [B, Hq, Tq, Dv], the part's own.
            hopper: Whether attention runs on the Hopper kernel.
            some_whole: Whether a layer is known that keeps everything.
        """
        assert part.pages is not None
        q, k, v, (batch, heads) = part.q, part.k, part.v, part.q.shape[:2]
        packing, block_table = (None, part.pages) if hopper else (packing_of(call, [part]), part.pages[None])

        def find(indices: Tensor, counts: Tensor) -> AttentionLaunch:
            x = Operands(call, q, k, v, call.scale, indices, counts, out, None, part.k_len, block_table, packing)
            found = find_hopper(x, counts) if hopper else find_portable(x, counts)
            found.describe(q, k, v)  # of later tensors the addresses are enough
            return found

        whole = None
        if some_whole:
            all_of_it = BlockSelection.everything(batch=batch, heads=heads, grid=launches.grid, device=q.device)
            rows = rows_of(all_of_it), all_of_it.counts
            whole = find(*rows), *rows
        return cls(
            part.tokens,
            part.prompt_lens,
            part.pages,
            launches,
            launches.operands(buffers),
            find(buffers["indices"], buffers["counts"]),
            whole,
            block_table,
            packing,
        )

    def choice(self, config: StemConfig, device: torch.device) -> KeepTable | Whole | None:
        """Return what a layer may keep, or how it keeps everything; None: what this is not prepared for."""
        budget, grid = budget_of(config, self.prompt_lens), self.launches.grid
        if budget.keeps_everything(grid):
            return self.whole
        keep = keep_table(budget, self.launches.rivals, device)
        return keep if keep.width(grid) <= self.operands["width"] else None

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        choice: KeepTable | Whole,
        stream: int | None,
    ) -> Tensor:
        """Select and attend; return the counts. The tensors are those of `TritonPreparedCall.run`."""
        q, out = q[self.tokens], out[self.tokens]
        if isinstance(choice, KeepTable):
            attention, counts = self.attention, torch.empty_like(self.operands["counts"])
            operands = {**self.operands, "counts": counts}
            indices = operands["indices"]
            self.launches.pool(q, k, v, self.pages, operands, stream)
            self.launches.choose(sinks, choice, operands, stream)
        else:
            attention, indices, counts = choice
        places: dict[str, Any] = {"block_table": self.block_table, "packing": self.packing}
        attention.run(q, k, v, out, indices, counts, **places, sinks=sinks, stream=stream)
        return counts


def _plain(config: StemConfig) -> bool:
    """Tell whether attention is over the kept blocks alone, in the inputs' precision."""
    return config.residual == "none" and config.precision == "auto"


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
