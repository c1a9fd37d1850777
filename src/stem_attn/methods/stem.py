"""Stem as a method among others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stem_attn.api import select_blocks
from stem_attn.blocks import BlockSelection
from stem_attn.config import StemConfig


@dataclass(frozen=True, slots=True)
class Stem:
    """Choose blocks as a `StemConfig` says.

    Args:
        config: See `StemConfig`.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
    """

    config: StemConfig = field(default_factory=StemConfig)
    backend: str = "auto"

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.config.block_size

    def select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        prompt_len: int | Sequence[int] | Tensor | None = None,
    ) -> BlockSelection:
        """See `stem_attn.select_blocks`."""
        return select_blocks(q, k, v, config=self.config, scale=scale, prompt_len=prompt_len, backend=self.backend)


def stem(preset: str = "default", **fields: Any) -> Stem:
    """Return Stem with a preset, some fields replaced.

    Raises:
        ValueError: The preset or a field is unknown, or a value is out of range.
    """
    return Stem(StemConfig.preset(preset, **fields))
