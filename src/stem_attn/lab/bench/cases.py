"""The problems that are measured: heads, lengths, and their random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.lab.shapes import Shape


@dataclass(frozen=True, slots=True)
class Case:
    """One measured problem: the last `q_len` of `k_len` tokens attend causally."""

    shape: Shape
    batch: int
    q_len: int
    k_len: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q, k and v from a normal distribution; the same seed gives the same tensors on one device."""
        gen = torch.Generator(self.device).manual_seed(seed)

        def draw(heads: int, tokens: int) -> Tensor:
            size = (self.batch, heads, tokens, self.shape.head_dim)
            return torch.randn(size, generator=gen, dtype=self.dtype, device=self.device)

        s = self.shape
        return draw(s.heads, self.q_len), draw(s.kv_heads, self.k_len), draw(s.kv_heads, self.k_len)

    def causal_flops(self) -> int:
        """Floating-point operations of both products over all causal (query, key) pairs."""
        offset = self.k_len - self.q_len
        pairs = self.q_len * offset + self.q_len * (self.q_len + 1) // 2
        return 4 * self.shape.head_dim * self.batch * self.shape.heads * pairs

    def kept_flops(self, selection: BlockSelection) -> int:
        """Floating-point operations of both products over the kept pairs; diagonal blocks count their causal part."""
        grid = BlockGrid(self.q_len, self.k_len, selection.block_size)
        spans = [grid.q_span(row) for row in range(grid.q_blocks)]
        tokens = torch.tensor([stop - start for start, stop in spans])
        full_blocks = selection.counts.cpu().long() - 1  # all but the diagonal one
        full = int((full_blocks * tokens).sum()) * grid.block_size
        diagonal = 0
        for row, (start, stop) in enumerate(spans):
            first = start + grid.offset - (grid.first_block + row) * grid.block_size  # position in its block
            diagonal += (stop - start) * (2 * first + stop - start + 1) // 2
        return 4 * self.shape.head_dim * (full + self.batch * self.shape.heads * diagonal)
