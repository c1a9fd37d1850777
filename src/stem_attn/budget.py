"""Token Position-Decay: how many key blocks each query block keeps.

A budget depends on positions, the prompt's length and the config only. So it is made on the host, for the whole
prompt, and a chunk reads its rows of it: a chunk boundary changes nothing. Results are cached, because every layer
and every chunk asks for the same: never write to them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """The blocks that every query row of a prompt may keep.

    Args:
        config: The schedule.
        blocks: int32 [n] on the CPU, from 1 to the prompt's n blocks, not yet clipped to a row's causal ones; [B, n]
            where batch rows differ, n being the longest prompt's.
    """

    config: StemConfig
    blocks: Tensor
    _pruning: array[int] = field(init=False, repr=False)  # rows before each row that do not keep everything

    def __post_init__(self) -> None:
        rows = torch.arange(self.blocks.shape[-1], device="cpu")
        prune = (self.blocks <= rows).view(-1, len(rows)).any(0)
        object.__setattr__(self, "_pruning", array("i", [0, *prune.cumsum(0).tolist()]))

    def rows(self, grid: BlockGrid) -> Tensor:
        """Return the budget of the rows that a call holds: int32 [Qb], or [B, Qb]."""
        return self.blocks[..., grid.first_block : grid.k_blocks]

    def keeps_everything(self, grid: BlockGrid) -> bool:
        """Tell whether every row of a call keeps all its causal blocks, so that there is nothing to score."""
        return self._pruning[grid.first_block] == self._pruning[grid.k_blocks]


def budget_of(config: StemConfig, prompt_lens: tuple[int, ...]) -> Budget:
    """Return the budget of a prompt, or of a batch of prompts.

    Args:
        config: The schedule.
        prompt_lens: Tokens of the whole prompt: one int for all batch rows, or one a row.

    Source: Stem, Eq. 3 (`decay_from="first_row"`); the authors' code (`decay_from="plateau"`).
    """
    return _budget_of(config, tuple(-(-n // config.block_size) for n in prompt_lens))


# Layers may have budgets of their own, and a server's prompts have many lengths: as blocks they soon come again.
@lru_cache(maxsize=4096)
def _budget_of(config: StemConfig, prompt_blocks: tuple[int, ...]) -> Budget:
    rows = [_prompt_budget(config, n) for n in prompt_blocks]
    if len(rows) == 1:
        return Budget(config, rows[0])
    table = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int32, device="cpu")
    for n, row in enumerate(rows):
        table[n, : len(row)] = row
    return Budget(config, table)


def _prompt_budget(config: StemConfig, n: int) -> Tensor:
    """Return the budget of all n rows of a prompt."""
    if n < config.dense_below:
        return torch.full((n,), n, dtype=torch.int32, device="cpu")
    start = config.budget_scale * (config.ratio(n) * n + config.budget_bias)
    if config.decay_from == "first_row":
        budget = start - start * (1 - config.decay) / n * torch.arange(n, dtype=torch.float64, device="cpu")
    else:
        plateau = min(max(int(start), config.budget_floor), n)
        budget = torch.full((n,), plateau, dtype=torch.float64, device="cpu")
        end = config.decay * plateau
        budget[plateau:] = torch.linspace(plateau, end, n - plateau, dtype=torch.float64, device="cpu")
    rows = budget.floor().clamp(min=config.budget_floor, max=n).to(torch.int32)
    tail = torch.arange(max(n - config.tail_blocks, 0), n, device="cpu")
    rows[tail] = rows[tail].maximum((config.tail_ratio * (tail + 1).double()).ceil().to(torch.int32))
    return rows
