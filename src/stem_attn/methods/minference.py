"""MInference: vertical and slash lines estimated from the last queries, or top-k blocks by mean pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.checks import check_qkv, resolve_scale
from stem_attn.methods.base import Knob, Rival, check_block_size, check_number, check_whole
from stem_attn.methods.estimates import last_attention, pooled_logits
from stem_attn.methods.masks import rank, vertical_slash_blocks

Pattern = Literal["vertical_slash", "block_sparse"]

# Of the authors' code.
_FIRST_TOKENS = 30  # verticals that are always kept, and the fewest there are
_NEAREST_TOKENS = 100  # slashes that are always kept
_FEWEST_SLASHES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class MInference(Rival):
    """Keep the strongest vertical and slash lines of the last queries' attention, or the best mean-pooled blocks.

    The authors search offline which pattern, of which size, each head of a model gets, and give every other head the
    sizes that are the defaults here. There is no such search here: one pattern goes for all heads. Their kernel
    computes single columns; here lines are rounded up to whole blocks, so that all methods share one attention:
    `densities` tells what that adds.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    https://arxiv.org/abs/2407.02490.

    Args:
        block_size: Tokens a block.
        pattern: `"vertical_slash"` or `"block_sparse"`.
        vertical_tokens: Columns kept by every query, the first 30 among them.
        slash_tokens: Diagonals kept, counted by distance; the nearest 100 among them.
        top_blocks: Blocks that a row keeps, in the block-sparse pattern.
        last_queries: Queries whose attention gives the lines.
        ratio: Factor of the three sizes; at least 30 columns and 50 diagonals remain.
    """

    knob: ClassVar[Knob] = Knob("ratio", low=0, high=None, rising=True)

    block_size: int = 64
    pattern: Pattern = "vertical_slash"
    vertical_tokens: int = 1000
    slash_tokens: int = 6096
    top_blocks: int = 100
    last_queries: int = 64
    ratio: float = 1.0

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}")
        for name in ("vertical_tokens", "slash_tokens", "top_blocks", "last_queries"):
            check_whole(name, getattr(self, name), 1)
        check_number("ratio", self.ratio, 0, float("inf"))

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> tuple[Tensor, ...]:
        if self.pattern == "block_sparse":
            return (rank(pooled_logits(q, k, grid, scale)),)
        vertical, slash = last_attention(q, k, self.last_queries, scale)
        vertical[..., :_FIRST_TOKENS] = torch.inf
        slash[..., :_NEAREST_TOKENS] = torch.inf
        return rank(vertical), rank(slash)

    def keep(self, estimate: tuple[Tensor, ...], grid: BlockGrid, lengths: list[int]) -> Tensor:
        if self.pattern == "block_sparse":
            return estimate[0] < max(int(self.top_blocks * self.ratio), 1)
        vertical, slash = self._lines(estimate)
        return vertical_slash_blocks(_any_in_block(vertical, grid), _touched(slash, grid), grid)

    def densities(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[float, float]:
        """Return the density before and after lines are rounded to blocks.

        Before: query-key pairs on a line over causal pairs. After: kept over causal blocks.

        Args:
            q: [B, Hq, Tq, D].
            k: [B, Hkv, Tk, D].
            v: [B, Hkv, Tk, Dv].
            scale: Factor of the logits; default `1 / sqrt(D)`.
        """
        check_qkv(q, k, v)
        grid = BlockGrid(q.shape[2], k.shape[2], self.block_size)
        estimate = self.estimate(q, k, v, grid, resolve_scale(scale, q.shape[3]))
        mask = self.mask(estimate, grid, [grid.k_len] * q.shape[0], q)
        after = int(mask.sum()) / (q.shape[0] * q.shape[1] * grid.causal_blocks)
        if self.pattern == "block_sparse":
            return after, after
        vertical, slash = self._lines(estimate)
        return _pairs(vertical, slash, grid) / (q.shape[0] * q.shape[1] * _causal_pairs(grid)), after

    def _lines(self, estimate: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the kept columns and the kept distances, bool [B, Hq, Tk] each."""
        vertical, slash = estimate
        return (
            vertical < max(int(self.vertical_tokens * self.ratio), _FIRST_TOKENS),
            slash < max(int(self.slash_tokens * self.ratio), _FEWEST_SLASHES),
        )


def _any_in_block(tokens: Tensor, grid: BlockGrid) -> Tensor:
    padded = F.pad(tokens, (0, grid.k_blocks * grid.block_size - grid.k_len))
    return torch.unflatten(padded, -1, (grid.k_blocks, grid.block_size)).any(-1)


def _touched(slash: Tensor, grid: BlockGrid) -> Tensor:
    """Return the distances in blocks, bool [B, Hq, Kb], of the blocks that kept diagonals cross."""
    size = grid.block_size
    nearer = _any_in_block(slash, grid)  # a diagonal at distance d crosses the blocks at d // size
    farther = _any_in_block(slash & (torch.arange(grid.k_len, device=slash.device) % size > 0), grid)
    return nearer | F.pad(farther[..., :-1], (1, 0))  # and, unless it runs from corner to corner, those behind


def _causal_pairs(grid: BlockGrid) -> int:
    return (grid.k_len * (grid.k_len + 1) - grid.offset * (grid.offset + 1)) // 2


def _pairs(vertical: Tensor, slash: Tensor, grid: BlockGrid) -> int:
    """Count the query-key pairs on a line, all batch rows and heads together."""
    tokens = torch.arange(grid.k_len, device=vertical.device)
    # Queries from max(j, offset) on see key j, and as many have a key at distance j.
    queries = grid.k_len - tokens.clamp(min=grid.offset)
    lines = int(((vertical.long() + slash.long()) * queries).sum())
    # Column c and distance d meet in query c + d, where there is one: columns from offset - d to k_len - d.
    columns_before = F.pad(vertical.cumsum(-1), (1, 0))
    meeting = columns_before[..., grid.k_len - tokens] - columns_before[..., (grid.offset - tokens).clamp(min=0)]
    return lines - int((meeting * slash).sum())
