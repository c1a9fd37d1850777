"""XAttention: softmax over strided antidiagonal sums, and the fewest blocks that cover a share of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.methods.base import Knob, Rival, check_block_size, check_number, check_whole
from stem_attn.methods.estimates import attention_mass
from stem_attn.methods.masks import causal_blocks, covered_before, forced_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class XAttention(Rival):
    """Keep, in every row, the fewest blocks whose estimated attention reaches the threshold.

    Query and key tokens form groups of `stride`; the logit of two groups is the mean over their antidiagonal, and a
    block's estimate is the softmax of these logits, summed over the block. The first block and the diagonal one are
    always kept and count first.

    Source: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring",
    https://arxiv.org/abs/2503.16428, Algorithm 1, with one threshold for all heads (the optional search of a threshold
    for each head needs calibration). The defaults are its settings for language models.

    Args:
        block_size: Tokens a block.
        stride: Tokens a group; it divides `block_size`.
        threshold: Share of a row's estimated attention to cover, from 0 to 1.
    """

    knob: ClassVar[Knob] = Knob("threshold", low=0, high=1, rising=True)

    block_size: int = 128
    stride: int = 8
    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_whole("stride", self.stride, 1, self.block_size)
        if self.block_size % self.stride:
            raise ValueError(f"stride must divide block_size {self.block_size}, got {self.stride}")
        check_number("threshold", self.threshold, 0, 1)

    def scores(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """Return the estimated attention: float32 [B, Hq, Qb, Kb], rows sum to 1."""
        return attention_mass(q, k, grid, scale, stride=self.stride)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        first = forced_blocks(grid, 1, 1, q.device)
        return covered_before(self.scores(q, k, v, grid, scale), first)

    def keep(self, estimate: Tensor, grid: BlockGrid, lengths: list[int]) -> Tensor:
        if self.threshold == 1:
            return causal_blocks(grid, estimate.device)
        return estimate < self.threshold
