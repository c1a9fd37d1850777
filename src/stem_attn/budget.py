"""Token Position-Decay: how many key blocks each query block keeps.

A budget depends on positions, the prompt's length and the config only, so it is computed on the host and a chunk
boundary cannot change it. All results are cached, because every layer asks for the same: never write to them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig


@lru_cache(maxsize=1024)  # layers may have budgets of their own
def block_budget(config: StemConfig, prompt_len: int, grid: BlockGrid) -> Tensor:
    """Return the budget of every query row of a call, not yet clipped to the row's causal blocks.

    Args:
        config: The schedule.
        prompt_len: Tokens of the whole prompt, at least `grid.k_len`.
        grid: The rows that the call holds.

    Returns:
        int32 [Qb] on the CPU; blocks, from 1 to the prompt's number of blocks.

    Source: Stem, Eq. 3 (`decay_from="first_row"`); the authors' code (`decay_from="plateau"`).
    """
    n = -(-prompt_len // config.block_size)
    return _prompt_budget(config, prompt_len, n)[grid.first_block : grid.k_blocks]


@lru_cache(maxsize=1024)
def keeps_everything(config: StemConfig, prompt_len: int, grid: BlockGrid) -> bool:
    """Tell whether every query row of a call keeps all its causal blocks, so that there is nothing to score."""
    return bool((block_budget(config, prompt_len, grid) > grid.block_ids()).all())


@lru_cache(maxsize=256)
def _prompt_budget(config: StemConfig, prompt_len: int, n: int) -> Tensor:
    """Return the budget of all n rows of the prompt."""
    if prompt_len < config.min_seq_len or n < config.dense_below:
        return torch.full((n,), n, dtype=torch.int32)
    start = config.budget_scale * (config.ratio(n) * n + config.budget_bias)
    if config.decay_from == "first_row":
        rows = torch.arange(n, dtype=torch.float64)
        budget = start - start * (1 - config.decay) / n * rows
    else:
        plateau = min(max(int(start), config.budget_floor), n)
        budget = torch.full((n,), plateau, dtype=torch.float64)
        budget[plateau:] = torch.linspace(plateau, config.decay * plateau, n - plateau, dtype=torch.float64)
    budget = budget.floor().clamp(min=config.budget_floor, max=n).to(torch.int32)
    tail = torch.arange(max(n - config.tail_blocks, 0), n)
    budget[tail] = budget[tail].maximum((config.tail_ratio * (tail + 1).double()).ceil().to(torch.int32))
    return budget
