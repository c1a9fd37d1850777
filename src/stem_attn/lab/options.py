"""Options that several commands share: the preset, the config file and the overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stem_attn.config import StemConfig, field_names, read_fields
from stem_attn.lab.errors import InputError

CONFIG_HELP = "Settings as a JSON object, such as stem-attn tune writes; they replace the preset's."


def config_from_options(
    preset: str, overrides: Sequence[str], file: Path | None = None, /, **defaults: Any
) -> StemConfig:
    """Build a config from `--preset NAME --config FILE --set field=value ...`; what comes later replaces.

    Args:
        preset: Name of a preset.
        overrides: `field=value` strings; a value is JSON, or else a plain string: `block_size=64`,
            `budget_ratio=[[160, 0.2], [null, 0.1]]`, `value_term=none`.
        file: A JSON object of fields.
        defaults: Fields that the command sets unless the file or an override does.

    Raises:
        InputError: The preset or a field is unknown, a value is out of range, or the file cannot be read.
    """
    fields = {**defaults, **(fields_from_file(file) if file is not None else {})}
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


def fields_from_file(path: Path) -> dict[str, Any]:
    """Read a config file; see `config.read_fields`.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        return read_fields(path)
    except ValueError as error:
        raise InputError(str(error)) from error
