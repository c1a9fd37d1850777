"""What the rivals have in common: an estimate from q, k and v, and a rule that keeps blocks by it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.checks import check_qkv, resolve_prompt_len, resolve_scale
from stem_attn.methods.masks import causal_blocks, forced_blocks


@dataclass(frozen=True, slots=True)
class Knob:
    """Name the field that trades density for accuracy.

    Args:
        field: A field of the method.
        low: Its least value.
        high: Its largest value; None stands for the number of keys.
        rising: Whether a larger value keeps more blocks.
        whole: Whether it is an int.
    """

    field: str
    low: float
    high: float | None
    rising: bool
    whole: bool = False


class Rival(ABC):
    """A method that estimates which blocks matter and keeps some of them.

    The two steps are apart because the estimate does not depend on the knob, so that a search over the knob estimates
    once. A subclass is a frozen dataclass; it need not care for causality and the diagonal block.
    """

    knob: ClassVar[Knob | None] = None

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens a block."""

    @abstractmethod
    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Any:
        """Compute what `keep` decides by; the knob is not read."""

    @abstractmethod
    def keep(self, estimate: Any, grid: BlockGrid, lengths: list[int]) -> Tensor:
        """Decide which blocks to keep.

        Args:
            estimate: What `estimate` returned.
            grid: The rows and columns.
            lengths: Tokens of the whole prompt, one a batch row.

        Returns:
            bool, broadcastable to [B, Hq, Qb, Kb]. Future blocks are dropped and diagonal ones kept by the caller.
        """

    def mask(self, estimate: Any, grid: BlockGrid, lengths: list[int], q: Tensor) -> Tensor:
        """Return the kept blocks as bool [B, Hq, Qb, Kb]: causal, with the diagonal block of every row."""
        kept = self.keep(estimate, grid, lengths) | forced_blocks(grid, 0, 1, q.device)
        return (kept & causal_blocks(grid, q.device)).expand(q.shape[0], q.shape[1], -1, -1)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        prompt_len: int | Sequence[int] | Tensor | None = None,
    ) -> BlockSelection:
        """Choose the key blocks that every query block keeps; see `stem_attn.method.Method.select`.

        Raises:
            ValueError: The inputs do not fit together, or ask for gradients.
        """
        check_qkv(q, k, v)
        grid = BlockGrid(q.shape[2], k.shape[2], self.block_size)
        lengths = one_a_row(resolve_prompt_len(prompt_len, q.shape[0], grid.k_len), q.shape[0])
        estimate = self.estimate(q, k, v, grid, resolve_scale(scale, q.shape[3]))
        mask = self.mask(estimate, grid, lengths, q)
        return BlockSelection.from_mask(mask, block_size=grid.block_size, q_len=grid.q_len, k_len=grid.k_len)


def one_a_row(lengths: tuple[int, ...], batch: int) -> list[int]:
    """Return one length a batch row, from as many or from one for all."""
    return list(lengths) * (batch // len(lengths))


def check_block_size(value: Any) -> None:
    """Check that the attention backends can run blocks of this many tokens."""
    check_whole("block_size", value, 16, 128)
    if value % 16:
        raise ValueError(f"block_size must be a multiple of 16, got {value}")


def check_whole(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Check that a field is an int within bounds."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an int from {low} to {high}, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Check that a field is a finite number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
