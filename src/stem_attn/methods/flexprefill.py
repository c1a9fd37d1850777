"""FlexPrefill: each head is query-aware or vertical-slash, and keeps what covers a share of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.methods.base import Knob, Rival, check_block_size, check_number, check_whole
from stem_attn.methods.estimates import key_means, last_attention, pooled_logits
from stem_attn.methods.masks import covered_before, rank, vertical_slash_blocks


@dataclass(frozen=True, slots=True)
class _Estimate:
    covered_vertical: Tensor  # float32 [B, Hq, Tk]; share covered before each key's turn
    covered_slash: Tensor  # the same for distances
    vertical_rank: Tensor  # int64 [B, Hq, Kb]; key blocks by attention
    slash_rank: Tensor  # the same for distances in blocks
    covered_pair: Tensor  # float32 [B, Hq, Qb, Kb]; share covered before each block's turn, over all rows
    divergence: Tensor  # float32 [B, Hq]; square root of the Jensen-Shannon divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexPrefill(Rival):
    """Keep the lines or blocks whose estimated attention covers a share gamma of each head's.

    The attention of the last query block is computed, and estimated from mean-pooled queries and keys. Where the two
    are close, below tau in the square root of their Jensen-Shannon divergence, the head is query-aware: the best
    blocks of all rows, by pooled attention, are kept until they cover gamma. Otherwise it is vertical-slash: as many
    block columns and block diagonals as it takes single ones to cover gamma, divided by the block size.

    Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    https://arxiv.org/abs/2502.20766, with the authors' code's way from tokens to blocks. The defaults are its README's.

    Args:
        block_size: Tokens a block.
        gamma: Share of the estimated attention to cover, from 0 to 1.
        tau: Below this a head is query-aware, from 0 to 1.
        min_budget: Tokens; at least so many columns, and as many diagonals, are kept.
    """

    knob: ClassVar[Knob] = Knob("gamma", low=0, high=1, rising=True)

    block_size: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_number("gamma", self.gamma, 0, 1)
        check_number("tau", self.tau, 0, 1)
        check_whole("min_budget", self.min_budget, 1)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> _Estimate:
        vertical, slash = last_attention(q, k, self.block_size, scale)
        vertical_blocks, slash_blocks = _block_sums(vertical, grid), _block_sums(slash, grid)
        pooled = torch.softmax(pooled_logits(q, k, grid, scale), -1)
        first = torch.arange(grid.k_blocks, device=q.device) == 0
        return _Estimate(
            covered_vertical=covered_before(vertical),
            covered_slash=covered_before(slash),
            vertical_rank=rank(vertical_blocks.masked_fill(first, torch.inf)),
            slash_rank=rank(slash_blocks.masked_fill(first, torch.inf)),
            covered_pair=covered_before(pooled.flatten(2)).view_as(pooled),
            divergence=_root_js_divergence(self._pooled_estimate(q, k, grid, scale), vertical_blocks),
        )

    def keep(self, estimate: _Estimate, grid: BlockGrid, lengths: list[int]) -> Tensor:
        least = -(-self.min_budget // self.block_size)
        aware = estimate.divergence < self.tau
        vertical, slash = (
            ((covered < self.gamma).sum(-1) // self.block_size + 1)
            .clamp(min=least)
            .masked_fill(aware, least)[..., None]
            for covered in (estimate.covered_vertical, estimate.covered_slash)
        )
        lines = vertical_slash_blocks(estimate.vertical_rank < vertical, estimate.slash_rank < slash, grid)
        return lines | (aware[..., None, None] & (estimate.covered_pair < self.gamma))

    def _pooled_estimate(self, q: Tensor, k: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """Estimate the attention of the last queries to each key block from means: float32 [B, Hq, Kb]."""
        query = torch.unflatten(q[:, :, -self.block_size :].mean(2, dtype=torch.float32), 1, (k.shape[1], -1))
        logits = (query @ key_means(k, grid).mT).flatten(1, 2)
        return torch.softmax(logits * scale, -1)


def _block_sums(tokens: Tensor, grid: BlockGrid) -> Tensor:
    padded = F.pad(tokens, (0, grid.k_blocks * grid.block_size - grid.k_len))
    return torch.unflatten(padded, -1, (grid.k_blocks, grid.block_size)).sum(-1)


def _root_js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the square root of the Jensen-Shannon divergence over the last dimension, in nats."""
    mean = (p + q) / 2
    both = torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)  # 0 log 0 is 0
    return (both.nan_to_num(0.0).sum(-1) / 2).clamp(min=0).sqrt()
