"""Stem under the registry's name for it."""

from __future__ import annotations

from typing import Any

from stem_attn.config import StemConfig
from stem_attn.methods import Stem


def stem(preset: str = "default", **fields: Any) -> Stem:
    """Return Stem with a preset, some fields replaced.

    Raises:
        ValueError: The preset or a field is unknown, or a value is out of range.
    """
    return Stem(StemConfig.preset(preset, **fields))
