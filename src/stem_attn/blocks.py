"""The geometry of blocks, and BlockSelection: which key blocks each query block keeps.

This module alone knows how tokens map to blocks. Blocks are absolute: with a prefix (`q_len < k_len`) the first
query row may start inside a block, and row r is the absolute block `first_block + r`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Map the tokens of one call to absolute blocks.

    Args:
        q_len: Query tokens, the last `q_len` of `k_len`.
        k_len: Key tokens, prefix included.
        block_size: Tokens a block.
    """

    q_len: int
    k_len: int
    block_size: int

    @property
    def offset(self) -> int:
        """Absolute position of the first query token."""
        return self.k_len - self.q_len

    @property
    def first_block(self) -> int:
        """Absolute block of the first query row."""
        return self.offset // self.block_size

    @property
    def k_blocks(self) -> int:
        """Key blocks, a partial last one included."""
        return -(-self.k_len // self.block_size)

    @property
    def q_blocks(self) -> int:
        """Query rows; the first and the last may be partial."""
        return self.k_blocks - self.first_block

    @property
    def causal_blocks(self) -> int:
        """(query row, key block) pairs that are not wholly in the future."""
        first, last = self.first_block, self.k_blocks
        return (last * (last + 1) - first * (first + 1)) // 2

    def q_span(self, row: int) -> tuple[int, int]:
        """Query tokens [start, stop) of a row, counted from the first query token."""
        start = (self.first_block + row) * self.block_size - self.offset
        return max(start, 0), min(start + self.block_size, self.q_len)

    def block_ids(self, device: torch.device | str | None = None) -> Tensor:
        """Absolute block of every query row: int64 [Qb]."""
        return torch.arange(self.first_block, self.k_blocks, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class BlockSelection:
    """Hold the key blocks that each query block of each head keeps.

    Args:
        indices: int32 [B, Hq, Qb, S]; absolute key blocks in ascending order, left-packed, padded with -1. The
            last kept block of a row is its diagonal one.
        counts: int32 [B, Hq, Qb]; kept blocks, at least 1. Heads may differ.
        block_size: Tokens a block.
        q_len: Query tokens the selection was made for.
        k_len: Key tokens the selection was made for.
    """

    indices: Tensor
    counts: Tensor
    block_size: int
    q_len: int
    k_len: int

    @property
    def grid(self) -> BlockGrid:
        """The geometry that the rows and indices refer to."""
        return BlockGrid(self.q_len, self.k_len, self.block_size)

    def to_mask(self) -> Tensor:
        """Return the kept blocks as bool [B, Hq, Qb, Kb]."""
        k_blocks = self.grid.k_blocks
        kept = torch.zeros((*self.counts.shape, k_blocks + 1), dtype=torch.bool, device=self.indices.device)
        # Padding lands in one extra column, which is cut off.
        kept.scatter_(-1, self.indices.long().where(self.indices >= 0, k_blocks), True)
        return kept[..., :k_blocks]

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_size: int, q_len: int, k_len: int) -> BlockSelection:
        """Build a selection from the kept blocks.

        Args:
            mask: bool [B, Hq, Qb, Kb].
            block_size: Tokens a block.
            q_len: Query tokens.
            k_len: Key tokens.

        Raises:
            ValueError: The mask has the wrong shape or dtype, keeps a future block, or drops a diagonal one.
        """
        grid = BlockGrid(q_len, k_len, block_size)
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[2:] != (grid.q_blocks, grid.k_blocks):
            raise ValueError(
                f"mask must be bool [B, Hq, {grid.q_blocks}, {grid.k_blocks}] for q_len={q_len}, k_len={k_len}, "
                f"block_size={block_size}; got {mask.dtype} {list(mask.shape)}"
            )
        diagonal = grid.block_ids(mask.device)[:, None]
        columns = torch.arange(grid.k_blocks, device=mask.device)
        if bool((mask & (columns > diagonal)).any()):
            raise ValueError("mask keeps a block in the future of its query block")
        if not bool(mask.gather(-1, diagonal.expand(*mask.shape[:3], 1)).all()):
            raise ValueError("mask drops the diagonal block of a query block; every row must keep its own")
        counts = mask.sum(-1, dtype=torch.int32)
        indices = pack_mask(mask, counts, int(counts.max()))
        return cls(indices, counts, block_size, q_len, k_len)

    @classmethod
    def band(
        cls, *, batch: int, heads: int, window: int, block_size: int, q_len: int, k_len: int, device: torch.device | str
    ) -> BlockSelection:
        """Select the blocks of a causal sliding window: keys `i - window < j <= i` of every query i.

        The edge blocks hold keys outside the window: pass the same `window` to `block_sparse_attention`.
        """
        grid = BlockGrid(q_len, k_len, block_size)
        rows = grid.block_ids(device)
        # A partial first row starts at the call's first query, not at its block's first token.
        first_query = (rows * block_size).clamp(min=grid.offset)
        oldest = (first_query - window + 1).clamp(min=0) // block_size
        counts = rows - oldest + 1
        width = min(-(-(window - 1) // block_size) + 1, grid.k_blocks)
        slots = torch.arange(width, device=device)
        indices = (oldest[:, None] + slots).where(slots < counts[:, None], -1)
        return cls(
            indices.int().expand(batch, heads, -1, -1), counts.int().expand(batch, heads, -1), block_size, q_len, k_len
        )

    def density(self) -> float:
        """Return kept blocks over causal blocks, all batch rows, heads and query rows together.

        Partial and diagonal blocks count as whole ones.
        """
        batch, heads, _ = self.counts.shape
        return int(self.counts.sum(dtype=torch.int64)) / (batch * heads * self.grid.causal_blocks)


def pack_mask(mask: Tensor, counts: Tensor, width: int) -> Tensor:
    """Turn kept blocks, bool [B, Hq, Qb, Kb], into ascending, left-packed, -1 padded int32 [B, Hq, Qb, width]."""
    slots = mask.cumsum(-1, dtype=torch.int32) - 1
    slots = slots.where(mask, width).long()
    columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices = torch.full((*counts.shape, width + 1), -1, dtype=torch.int32, device=mask.device)
    return indices.scatter_(-1, slots, columns)[..., :width]
