"""The geometry of blocks, and BlockSelection: which key blocks each query block keeps.

This module alone knows how tokens map to blocks. Blocks are absolute: with a prefix (`q_len < k_len`) the first
query row may start inside a block, and row r is the absolute block `first_block + r`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_attn import plots
from stem_attn.config import check_int


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

    def block_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """Absolute block of every query row: int64 [Qb]."""
        return torch.arange(self.first_block, self.k_blocks, device=device)


class BlockSelection:
    """Hold the key blocks that each query block of each head keeps.

    What is passed in is checked, which waits for a GPU that holds it (while torch.compile traces, shapes only).

    Args:
        indices: int32 [B, Hq, Qb, S]; absolute key blocks in ascending order, left-packed, padded with -1. The
            last kept block of a row is its diagonal one.
        counts: int32 [B, Hq, Qb]; kept blocks, at least 1. Heads may differ.
        block_size: Tokens a block.
        q_len: Query tokens the selection was made for.
        k_len: Key tokens the selection was made for.

    Raises:
        ValueError: A shape, a dtype or a row is not as described.
    """

    __slots__ = ("_indices", "_keeps_everything", "block_size", "counts", "k_len", "q_len")

    block_size: int
    q_len: int
    k_len: int
    counts: Tensor

    def __init__(
        self,
        indices: Tensor | None,
        counts: Tensor,
        block_size: int,
        q_len: int,
        k_len: int,
        *,
        _made_here: bool = False,
    ) -> None:
        if not _made_here:
            grid = BlockGrid(q_len, k_len, block_size)
            indices = _check_form(indices, counts, grid)
            if not torch.compiler.is_compiling():
                _check_rows(indices, counts, grid)
        self._indices = indices
        self._keeps_everything = indices is None
        self.counts = counts
        self.block_size, self.q_len, self.k_len = block_size, q_len, k_len

    @classmethod
    def made(cls, indices: Tensor, counts: Tensor, grid: BlockGrid) -> BlockSelection:
        """Return a selection that this package made itself: nothing is checked, no device is waited for.

        Args:
            indices: int32 [B, Hq, Qb, S].
            counts: int32 [B, Hq, Qb].
            grid: The rows and columns.
        """
        return cls(indices, counts, grid.block_size, grid.q_len, grid.k_len, _made_here=True)

    @classmethod
    def everything(cls, *, batch: int, heads: int, grid: BlockGrid, device: torch.device | str) -> BlockSelection:
        """Return the selection of all causal blocks. Its indices are made when somebody reads them."""
        counts = (grid.block_ids(device) + 1).int().expand(batch, heads, -1)
        return cls(None, counts, grid.block_size, grid.q_len, grid.k_len, _made_here=True)

    @property
    def indices(self) -> Tensor:
        """int32 [B, Hq, Qb, S]: the kept blocks."""
        if self._indices is None:
            columns = torch.arange(self.grid.k_blocks, dtype=torch.int32, device=self.counts.device)
            kept = torch.where(columns < self.counts[:1, :1, :, None], columns, -1)
            self._indices = kept.expand(*self.counts.shape[:2], -1, -1)
        return self._indices

    @property
    def keeps_everything(self) -> bool:
        """Whether this was made as the selection of all causal blocks."""
        return self._keeps_everything

    @property
    def grid(self) -> BlockGrid:
        """The geometry that the rows and indices refer to."""
        return BlockGrid(self.q_len, self.k_len, self.block_size)

    def to_mask(self) -> Tensor:
        """Return the kept blocks as bool [B, Hq, Qb, Kb]."""
        k_blocks = self.grid.k_blocks
        kept = torch.zeros((*self.counts.shape, k_blocks + 1), dtype=torch.bool, device=self.counts.device)
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
        return cls.made(pack_mask(mask, counts, int(counts.max())), counts, grid)

    @classmethod
    def band(
        cls, *, batch: int, heads: int, window: int, block_size: int, q_len: int, k_len: int, device: torch.device | str
    ) -> BlockSelection:
        """Select the blocks of a causal sliding window: keys `i - window < j <= i` of every query i.

        The edge blocks hold keys outside the window: pass the same `window` to `block_sparse_attention`.

        Raises:
            ValueError: The window is no int of at least 1 token.
        """
        check_int("window", window, 1)
        grid = BlockGrid(q_len, k_len, block_size)
        if window >= k_len:
            return cls.everything(batch=batch, heads=heads, grid=grid, device=device)
        rows = grid.block_ids(device)
        # A partial first row starts at the call's first query, not at its block's first token.
        first_query = (rows * block_size).clamp(min=grid.offset)
        oldest = (first_query - window + 1).clamp(min=0) // block_size
        counts = rows - oldest + 1
        width = min(-(-(window - 1) // block_size) + 1, grid.k_blocks)
        slots = torch.arange(width, device=device)
        indices = (oldest[:, None] + slots).where(slots < counts[:, None], -1)
        return cls.made(indices.int().expand(batch, heads, -1, -1), counts.int().expand(batch, heads, -1), grid)

    def density(self) -> float:
        """Return kept blocks over causal blocks, all batch rows, heads and query rows together.

        Partial and diagonal blocks count as whole ones.
        """
        batch, heads, _ = self.counts.shape
        return int(self.counts.sum(dtype=torch.int64)) / (batch * heads * self.grid.causal_blocks)

    def plot(self, *, head: int | None = None, batch: int = 0, mass: Tensor | None = None, axes: Any = None) -> Any:
        """Draw the kept blocks with matplotlib.

        Args:
            head: Query head; None: the share of heads that keep each block.
            batch: Batch row.
            mass: float [B, Hq, Qb, Kb], the attention on every key block, as `methods.estimates.attention_mass` gives
                it: pruned blocks are then drawn too, in another colour, and both are stronger where there is more.
            axes: matplotlib axes to draw into; None: new ones.

        Returns:
            The axes.

        Raises:
            ValueError: There is no such head or batch row, or the mass has another shape.
            ImportError: matplotlib is not installed.
        """
        batches, heads, q_blocks = self.counts.shape
        for name, index, size in (("batch", batch, batches), ("head", head or 0, heads)):
            if not 0 <= index < size:
                raise ValueError(f"{name} must be from 0 to {size - 1}, got {index}")
        kept = self.to_mask()
        if mass is not None and mass.shape != kept.shape:
            raise ValueError(f"mass must have the shape {list(kept.shape)} of the blocks, got {list(mass.shape)}")
        chosen = slice(None) if head is None else slice(head, head + 1)
        grid, shown = self.grid, kept[batch, chosen].float().mean(0)
        name = "all heads" if head is None else f"head {head}"
        return plots.draw_blocks(
            shown,
            None if mass is None else mass[batch, chosen].mean(0),
            rows=(grid.first_block, grid.first_block + q_blocks),
            title=f"{name}: density {float(shown.sum()) / grid.causal_blocks:.3f}",
            axes=axes,
        )


def pack_mask(mask: Tensor, counts: Tensor, width: int) -> Tensor:
    """Turn kept blocks, bool [B, Hq, Qb, Kb], into ascending, left-packed, -1 padded int32 [B, Hq, Qb, width]."""
    slots = mask.cumsum(-1, dtype=torch.int32) - 1
    slots = slots.where(mask, width).long()
    columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices = torch.full((*counts.shape, width + 1), -1, dtype=torch.int32, device=mask.device)
    return indices.scatter_(-1, slots, columns)[..., :width]


def _check_form(indices: Tensor | None, counts: Tensor, grid: BlockGrid) -> Tensor:
    """Check what shapes, dtypes and devices tell of a selection; return the indices."""
    for name, x, rank in (("indices", indices, 4), ("counts", counts, 3)):
        if not isinstance(x, Tensor) or x.ndim != rank or x.dtype != torch.int32:
            form = "[B, Hq, Qb, S]" if rank == 4 else "[B, Hq, Qb]"
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be int32 {form}, got {got}")
    if not 0 < grid.q_len <= grid.k_len or grid.block_size < 1:
        raise ValueError(
            f"a selection needs 0 < q_len <= k_len and a block_size of at least 1; got q_len={grid.q_len}, "
            f"k_len={grid.k_len}, block_size={grid.block_size}"
        )
    assert indices is not None
    if indices.shape[:3] != counts.shape or counts.shape[2] != grid.q_blocks:
        raise ValueError(
            f"selection must have rows [B, Hq, {grid.q_blocks}] for q_len={grid.q_len}, k_len={grid.k_len}, "
            f"block_size={grid.block_size}; got counts {list(counts.shape)} and indices {list(indices.shape)}"
        )
    if indices.shape[3] == 0:
        raise ValueError("counts must lie from 1 to the 0 slots of a row: indices has no slot")
    if indices.device != counts.device:
        raise ValueError(f"indices and counts must be on one device, got {indices.device} and {counts.device}")
    return indices


def _check_rows(indices: Tensor, counts: Tensor, grid: BlockGrid) -> None:
    """Check every row of a selection whose form is right; reads it once."""
    diagonal = grid.block_ids(indices.device)
    slots = torch.arange(indices.shape[3], device=indices.device)
    kept = slots < counts[..., None]
    last = indices.gather(-1, (counts.long() - 1).clamp(0, indices.shape[3] - 1)[..., None])[..., 0]
    rising = (indices[..., 1:] > indices[..., :-1]) | ~kept[..., 1:]
    wrong = {
        f"counts must lie from 1 to the {indices.shape[3]} slots of a row": (counts < 1) | (counts > len(slots)),
        "a row's blocks must rise": ~rising,
        "a row's first block must be at least 0": kept[..., :1] & (indices[..., :1] < 0),
        "the last kept block of a row must be its diagonal one": last != diagonal,
        "slots past a row's count must hold -1": ~kept & (indices != -1),
    }
    flags = torch.stack([rule.any() for rule in wrong.values()]).tolist()
    for message, broken in zip(wrong, flags, strict=True):
        if broken:
            where = wrong[message].nonzero()[0].tolist()
            row = tuple(where[:3])
            shown = indices[row].tolist()
            raise ValueError(
                f"{message}; head {row[1]} of batch row {row[0]} has in query row {row[2]} (block "
                f"{grid.first_block + row[2]}) count {int(counts[row])} and indices {shown[:8]}"
                + ("..." if len(shown) > 8 else "")
            )
