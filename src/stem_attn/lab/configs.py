"""Configs and fields as they stand on a command line: a preset, a file, and changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stem_attn.config import PRESETS, StemConfig, field_names, read_fields
from stem_attn.lab.errors import InputError


def config_from_options(
    preset: str,
    changes: Sequence[str],
    file: Path | None = None,
    own_presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> StemConfig:
    """Build a config from `--preset NAME --config FILE --set field=value ...`; what comes later replaces.

    Args:
        preset: Name of a preset.
        changes: `field=value` strings; see `read_changes`.
        file: A JSON object of fields.
        own_presets: Presets of the command alone, by name: what differs from the default.

    Raises:
        InputError: The preset or a field is unknown, a value is out of range, or the file cannot be read.
    """
    presets = {**(own_presets or {}), **PRESETS}
    if preset not in presets:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(presets)}")
    fields = {**presets[preset], **(fields_from_file(file) if file is not None else {})}
    for text in changes:
        name, equals, _ = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set takes field=value, got {text!r}; fields: {', '.join(field_names())}")
    try:
        return StemConfig.from_dict({**fields, **read_changes(changes)})
    except ValueError as error:
        raise InputError(str(error)) from error


def read_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Read `field=value` strings.

    A value is JSON, or else a plain string: `block_size=64`, `budget_ratio=[[160, 0.2], [null, 0.1]]`,
    `value_term=none`.
    """
    fields: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            fields[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[name.strip()] = value.strip()
    return fields


def fields_from_file(path: Path) -> dict[str, Any]:
    """Read a config file; see `config.read_fields`.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        return read_fields(path)
    except ValueError as error:
        raise InputError(str(error)) from error
