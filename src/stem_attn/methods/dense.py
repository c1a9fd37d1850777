"""Every block: what the others approximate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.methods.base import Rival, check_block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Rival):
    """Keep every block.

    Args:
        block_size: Tokens a block.
    """

    block_size: int = 128

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> torch.device:
        return q.device

    def keep(self, estimate: torch.device, grid: BlockGrid, lengths: list[int]) -> Tensor:
        return torch.ones(grid.q_blocks, grid.k_blocks, dtype=torch.bool, device=estimate)
