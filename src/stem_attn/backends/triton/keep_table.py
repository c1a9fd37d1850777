"""What the kernels read of a budget, on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stem_attn.backends.triton.host_numbers import page_locked, to_device
from stem_attn.blocks import BlockGrid
from stem_attn.budget import Budget
from stem_attn.selection import kept_at_least, kept_per_row, most_kept

WIDTHS = 64
"""Calls whose width a table remembers: the layers of a step ask for the same."""


@lru_cache(maxsize=4096)  # as of budgets
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
        self._host = page_locked(keep.flatten()) if device.type == "cuda" else keep.flatten()
        self._device = device
        self._widths: dict[tuple[int, int], int] = {}  # by the first and the last row of a call
        self._copies: dict[int, Tensor] = {}  # by stream

    def width(self, grid: BlockGrid) -> int:
        """Bound the blocks that any row of a call keeps."""
        rows = grid.first_block, grid.k_blocks
        width = self._widths.get(rows)
        if width is None:
            if len(self._widths) >= WIDTHS:  # a server's chunks begin and end anywhere
                self._widths.clear()
            width = self._widths[rows] = int(self._most[..., slice(*rows)].max())
        return width

    def on_device(self) -> Tensor:
        """Return the table on the device: copied once a stream, and within a captured graph each time."""
        if self._device.type != "cuda":
            return self._host
        if torch.cuda.is_current_stream_capturing():
            return to_device(self._host, self._device)
        stream = torch.cuda.current_stream().cuda_stream
        table = self._copies.get(stream)
        if table is None:
            table = self._copies[stream] = to_device(self._host, self._device)
        return table
