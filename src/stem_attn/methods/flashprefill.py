"""FlashPrefill: queries against mean keys, and all blocks not far below a row's best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.methods.base import Knob, Rival, check_block_size, check_number, check_whole
from stem_attn.methods.estimates import by_problem, key_means, present_queries, tiles
from stem_attn.methods.masks import forced_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashPrefill(Rival):
    """Keep the blocks whose energy is at least `alpha` times that of the row's best block.

    A block's energy is `exp(q . mean(k) / sqrt(d))`, summed over the row's queries, of blocks before the diagonal one.

    Source: Fan et al., "FlashPrefill: Instantaneous Pattern Discovery and Thresholding for Ultra-Fast Long-Context
    Prefilling", https://arxiv.org/abs/2603.06199. The authors' code sets alpha by model, 0.18 (Llama), 0.12 (Qwen3) or
    0.08 (Qwen2); the default is the one of their second version, https://arxiv.org/abs/2608.19758. That version's mean
    correction of pruned blocks changes the attention, not the selection, and is not part of this.

    Args:
        block_size: Tokens a block.
        alpha: Least share of the best block's energy, from 0 to 1.
        sink_blocks: First blocks that are always kept.
        local_blocks: Blocks up to and including the diagonal one that are always kept.
        last_blocks: Query blocks at the end of the prompt that keep everything.
    """

    knob: ClassVar[Knob] = Knob("alpha", low=0, high=1, rising=False)

    block_size: int = 128
    alpha: float = 0.1
    sink_blocks: int = 2
    local_blocks: int = 4
    last_blocks: int = 2

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_number("alpha", self.alpha, 0, 1)
        check_whole("sink_blocks", self.sink_blocks, 0)
        check_whole("local_blocks", self.local_blocks, 1)
        check_whole("last_blocks", self.last_blocks, 0)

    def scores(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """Return the logarithm of every block's energy: float32 [B, Hq, Qb, Kb], -inf from the diagonal one on."""
        queries = by_problem(q, k.shape[1], grid)
        keys = key_means(k, grid).flatten(0, 1)
        problems, heads = queries.shape[:2]
        absent = ~present_queries(grid, q.device)[:, :, None]
        shape = problems, heads, grid.q_blocks, grid.k_blocks
        energy = torch.empty(shape, dtype=torch.float32, device=q.device)
        for which, rows in tiles(problems, grid.q_blocks, heads * grid.block_size * grid.k_blocks):
            tile = queries[which, :, rows]
            logits = (tile.float().flatten(1, 3) @ keys[which].mT).mul_(scale).view(*tile.shape[:4], -1)
            energy[which, :, rows] = logits.masked_fill_(absent[rows], -torch.inf).logsumexp(3)
        past = torch.arange(grid.k_blocks, device=q.device) < grid.block_ids(q.device)[:, None]
        return energy.masked_fill_(~past, -torch.inf).view(*q.shape[:2], grid.q_blocks, grid.k_blocks)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        scores = self.scores(q, k, v, grid, scale)
        return scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)

    def keep(self, estimate: Tensor, grid: BlockGrid, lengths: list[int]) -> Tensor:
        kept = estimate >= (math.log(self.alpha) if self.alpha else -math.inf)
        kept |= forced_blocks(grid, self.sink_blocks, self.local_blocks, estimate.device)
        blocks = -(-torch.tensor(lengths, dtype=torch.int64, device=estimate.device) // self.block_size)
        last = grid.block_ids(estimate.device) >= blocks[:, None] - self.last_blocks  # [B, Qb]
        return kept | last[:, None, :, None]
