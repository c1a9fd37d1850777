"""Options that several commands share: the preset and its overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stem_attn.config import StemConfig, field_names
from stem_attn.errors import InputError


def config_from_options(preset: str, overrides: Sequence[str], /, **defaults: Any) -> StemConfig:
    """Build a config from `--preset NAME --set field=value ...`.

    Args:
        preset: Name of a preset.
        overrides: `field=value` strings; a value is JSON, or else a plain string: `block_size=64`,
            `budget_ratio=[[160, 0.2], [null, 0.1]]`, `value_term=none`.
        defaults: Fields that the command sets unless an override does.

    Raises:
        InputError: The preset or a field is unknown, or a value is out of range.
    """
    fields = dict(defaults)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set takes field=value, got {text!r}; fields: {', '.join(field_names())}")
        try:
            fields[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[name.strip()] = value.strip()
    try:
        return StemConfig.preset(preset, **fields)
    except ValueError as error:
        raise InputError(str(error)) from error
