"""What the kernels read of a budget, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from stem_attn.backends.triton.host_numbers import page_locked, to_device
from stem_attn.backends.triton.launch import is_captured, stream_of
from stem_attn.blocks import BlockGrid
from stem_attn.budget import CHUNKS, Budget, Budgets
from stem_attn.selection import kept_at_least, kept_per_row


def keep_table(budget: Budget, rivals: int, device: torch.device) -> KeepTable:
    """Find or make the table of a budget.

    Args:
        budget: Of a prompt or a batch of prompts.
        rivals: Heads that share budgets; at most 1: none do.
        device: Where kernels read it.
    """
    return keep_tables(budget.of_layers, rivals, device)[budget.layer]


@lru_cache(maxsize=256)
def keep_tables(budgets: Budgets, rivals: int, device: torch.device) -> list[KeepTable]:
    """Make the tables of budgets that were made together; see `keep_table`."""
    tables = KeepTables(budgets, rivals, device)
    return [KeepTable(tables, layer) for layer in range(len(budgets.configs))]


@dataclass(frozen=True, slots=True, eq=False)
class KeepTable:
    """What the kernels read of a budget: a number for every row of the whole prompt, so that all chunks share it.

    Args:
        tables: Where it stands.
        layer: Which of them it is.
    """

    tables: KeepTables
    layer: int

    @property
    def stride(self) -> int:
        """Numbers from one batch row to the next, 0 where they share a budget."""
        return self.tables.stride

    @property
    def least_at(self) -> int:
        """Where the blocks that every head keeps at least begin, where heads share budgets."""
        return self.tables.least_at

    def width(self, grid: BlockGrid) -> int:
        """Bound the blocks that any row of a call keeps."""
        return self.tables.widths(grid)[self.layer]

    def on_device(self) -> Tensor:
        """Return the table on the device: copied once a stream, and within a captured graph each time."""
        return self.tables.on_device(self.layer)


class KeepTables:
    """The tables of budgets that were made together; see `KeepTable` for what they share."""

    def __init__(self, budgets: Budgets, rivals: int, device: torch.device) -> None:
        config, blocks = budgets.configs[0], budgets.blocks
        tokens = blocks.shape[-1] * config.block_size
        prompt = BlockGrid(tokens, tokens, config.block_size)
        keep, most = kept_per_row(blocks, prompt, config)
        self.stride = blocks.shape[-1] if blocks.ndim == 3 else 0
        self.least_at = keep[0].numel()
        parts = [keep]
        if rivals > 1:  # a head keeps the most when all others keep the least
            least = kept_at_least(keep, prompt, config)
            most = (most * rivals - least * (rivals - 1)).minimum(prompt.block_ids().int() + 1)
            parts.append(least)
        self._most = most
        numbers = torch.cat([part.flatten(1) for part in parts], 1)
        # Every table starts at a multiple of 16 bytes: kernels are compiled for it.
        numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 4))
        self._host = page_locked(numbers) if device.type == "cuda" else numbers
        self._device = device
        self._widths: dict[tuple[int, int], list[int]] = {}  # by the first and the last row of a call
        self._copies: dict[int | None, tuple[Tensor, ...]] = {}  # by stream

    def widths(self, grid: BlockGrid) -> list[int]:
        """Bound the blocks that any row of a call keeps, of every layer."""
        rows = grid.first_block, grid.k_blocks
        widths = self._widths.get(rows)
        if widths is None:
            if len(self._widths) >= CHUNKS:
                self._widths.clear()
            widths = self._widths[rows] = self._most[..., slice(*rows)].flatten(1).amax(1).tolist()
        return widths

    def on_device(self, layer: int) -> Tensor:
        """Return one layer's table; see `KeepTable.on_device`."""
        if self._device.type != "cuda":
            return self._host[layer]
        if is_captured(self._device):
            return to_device(self._host[layer], self._device)
        stream = stream_of(self._device)
        copies = self._copies.get(stream)
        if copies is None:
            copies = self._copies[stream] = to_device(self._host, self._device).unbind(0)
        return copies[layer]
