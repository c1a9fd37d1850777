"""StreamingLLM's A shape: the first tokens and a window of recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.methods.base import Knob, Rival, check_block_size, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class AShape(Rival):
    """Keep the blocks that hold the sink tokens, or a token of a query's window.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453.
    The defaults are those of the authors' example script.

    Args:
        block_size: Tokens a block.
        sink_tokens: First tokens that every query sees.
        local_tokens: Latest tokens that a query sees, its own included.
    """

    knob: ClassVar[Knob] = Knob("local_tokens", low=1, high=None, rising=True, whole=True)

    block_size: int = 128
    sink_tokens: int = 4
    local_tokens: int = 2000

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_whole("sink_tokens", self.sink_tokens, 0)
        check_whole("local_tokens", self.local_tokens, 1)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> torch.device:
        return q.device

    def keep(self, estimate: torch.device, grid: BlockGrid, lengths: list[int]) -> Tensor:
        first_query = (grid.block_ids(estimate) * grid.block_size).clamp(min=grid.offset)
        oldest = (first_query - self.local_tokens + 1).clamp(min=0) // grid.block_size
        columns = torch.arange(grid.k_blocks, device=estimate)
        return (columns >= oldest[:, None]) | (columns * grid.block_size < self.sink_tokens)
