"""Give any method the default's tail, so that comparisons are of the choice of blocks and not of the tail."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stem_attn.api import select_blocks
from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig
from stem_attn.methods.base import Knob, Rival


def tail_fields() -> dict[str, Any]:
    """Return the default config's fields that say what the last rows of a prompt keep."""
    default = StemConfig()
    names = [item.name for item in dataclasses.fields(default) if item.name.startswith("tail_")]
    return {name: getattr(default, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class WithTail(Rival):
    """Choose blocks with a method, but for the last rows of the prompt, which keep what the default config keeps there.

    Args:
        method: Decides about the other rows.
        at: What the method's knob is set to; None: its own field.
        config: The tail's; of the method's block size.
    """

    method: Rival
    at: float | None = None
    config: StemConfig = field(default_factory=StemConfig)

    @property
    def knob(self) -> Knob | None:  # type: ignore[override]
        """The method's."""
        return None if self.method.knob is None else dataclasses.replace(self.method.knob, field="at")

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.method.block_size

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> tuple[Any, Tensor]:
        """Return the method's estimate, and the tail's kept blocks, bool [B, Hq, rows, Kb]."""
        first = max(grid.q_blocks - self.config.tail_blocks, 0)
        last_queries = q[:, :, grid.q_span(first)[0] :] if first < grid.q_blocks else q[:, :, :0]
        tail = select_blocks(last_queries, k, v, config=self.config, scale=scale).to_mask()
        return self.method.estimate(q, k, v, grid, scale), tail

    def keep(self, estimate: tuple[Any, Tensor], grid: BlockGrid, lengths: list[int]) -> Tensor:
        """Return the method's kept blocks with the tail's rows in the place of its last ones."""
        method: Any = self.method
        if self.at is not None and method.knob is not None:
            method = dataclasses.replace(method, **{method.knob.field: self.at})
        inner, tail = estimate
        shape = (*tail.shape[:2], grid.q_blocks, grid.k_blocks)
        kept: Tensor = method.keep(inner, grid, lengths).expand(shape).clone()
        kept[:, :, grid.q_blocks - tail.shape[2] :] = tail
        return kept
