"""Uniform top-k: Stem without its position decay, at the same cost."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from stem_attn.api import select_blocks
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.config import StemConfig
from stem_attn.methods.base import Knob, Rival, check_whole
from stem_attn.methods.knob import first_rows_keep
from stem_attn.selection import most_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(Rival):
    """Keep equally many blocks in every row, scored and forced as a Stem config says.

    By default `k` is the one whose kept blocks, over the whole prompt, come closest to those of the config's schedule:
    about 0.85 of what the first rows keep where the last ones keep 0.7 of it.

    Source: Stem (arXiv 2603.06274), Eq. 4 and the ablation of Table 5.

    Args:
        config: Scoring, forced blocks, and the schedule whose cost is matched.
        k: Blocks a row, forced ones counted as the config says; None: at equal cost.
    """

    knob: ClassVar[Knob] = Knob("k", low=1, high=None, rising=True, whole=True)

    config: StemConfig = field(default_factory=StemConfig)
    k: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, StemConfig):
            raise ValueError(f"config must be a StemConfig, got {type(self.config).__name__}")
        if self.k is not None:
            check_whole("k", self.k, 1)

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.config.block_size

    def estimate(
        self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        return q, k, v, scale

    def keep(self, estimate: tuple[Tensor, Tensor, Tensor, float], grid: BlockGrid, lengths: list[int]) -> Tensor:
        q, k, v, scale = estimate
        if len(set(lengths)) == 1:
            return self._select(q, k, v, scale, lengths[0])
        rows = [slice(b, b + 1) for b in range(len(lengths))]  # each with a k of its own
        return torch.cat([self._select(q[b], k[b], v[b], scale, n) for b, n in zip(rows, lengths, strict=True)])

    def _select(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt_len: int) -> Tensor:
        blocks = self.equal_cost_k(prompt_len) if self.k is None else self.k
        return select_blocks(q, k, v, config=_constant(self.config, blocks), scale=scale).to_mask()

    def equal_cost_k(self, prompt_len: int) -> int:
        """Return the blocks a row that cost what the config's schedule costs.

        Args:
            prompt_len: Tokens of the whole prompt.
        """
        return _equal_cost_k(self.config, prompt_len)


@lru_cache(maxsize=256)
def _equal_cost_k(config: StemConfig, prompt_len: int) -> int:
    grid = BlockGrid(prompt_len, prompt_len, config.block_size)

    def cost(config: StemConfig) -> int:
        return int(most_kept(budget_of(config, (prompt_len,)).rows(grid), grid, config).sum())

    wanted = cost(config)
    enough = 1 + bisect_left(range(1, grid.k_blocks), wanted, key=lambda k: cost(_constant(config, k)))
    return min((max(enough - 1, 1), enough), key=lambda k: abs(cost(_constant(config, k)) - wanted))


def _constant(config: StemConfig, k: int) -> StemConfig:
    """Replace a config's schedule by k blocks in every row."""
    return dataclasses.replace(first_rows_keep(config, k), decay=1.0, tail_blocks=0)
