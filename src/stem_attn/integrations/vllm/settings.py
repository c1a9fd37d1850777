"""How a user configures Stem in vLLM: `--additional-config '{"stem": {...}}'`, and whether it is selected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from stem_attn.config import PRESETS, StemConfig, field_names, read_fields
from stem_attn.integrations.vllm.register import is_stem

KEY = "stem"
_OWN_KEYS = ("preset", "config_file", "crossover")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a user may set.

    Args:
        config: The method.
        preset: Name of the preset that `config` started from.
        crossover: Whether prompts that keep too many blocks to be faster than dense attention go dense. Turn it off
            to study accuracy.
    """

    config: StemConfig
    preset: str
    crossover: bool


def parse(given: Mapping[str, Any]) -> Settings:
    """Read the value of `additional_config["stem"]`.

    Fields of StemConfig may stand in it, and `preset`, `config_file` (a JSON object of StemConfig fields) and
    `crossover`. A field given here replaces the file's, and the file's the preset's.

    Raises:
        ValueError: A key is unknown, a value is out of range, or the file cannot be read.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"additional_config[{KEY!r}] must be an object, got {type(given).__name__}")
    unknown = sorted(set(given) - set(_OWN_KEYS) - set(field_names()))
    if unknown:
        known = ", ".join((*_OWN_KEYS, *field_names()))
        raise ValueError(f"unknown key {', '.join(unknown)} in additional_config[{KEY!r}]; known: {known}")
    preset = given.get("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    crossover = given.get("crossover", True)
    if not isinstance(crossover, bool):
        raise ValueError(f"crossover must be true or false, got {crossover!r}")
    from_file = _read_file(given["config_file"]) if "config_file" in given else {}
    inline = {name: value for name, value in given.items() if name not in _OWN_KEYS}
    return Settings(StemConfig.preset(preset, **{**from_file, **inline}), preset, crossover)


def _read_file(path: Any) -> dict[str, Any]:
    if not isinstance(path, str):
        raise ValueError(f"config_file must be a path, got {path!r}")
    return read_fields(Path(path))


def describe(settings: Settings) -> str:
    """Return the preset and what differs from it, for the log."""
    preset = StemConfig.preset(settings.preset)
    changed = [
        f"{f.name}={getattr(settings.config, f.name)}"
        for f in fields(StemConfig)
        if f.init and getattr(settings.config, f.name) != getattr(preset, f.name)
    ]
    return f"preset {settings.preset}" + (f" with {', '.join(changed)}" if changed else "")


def settings_of(vllm_config: Any) -> Settings | None:
    """Return the settings of an engine, or None if Stem is not selected there.

    Raises:
        ValueError: They are wrong.
    """
    attention = vllm_config.attention_config
    if not is_stem(attention.backend_per_kind.get("full_attention", attention.backend)):
        return None
    additional = vllm_config.additional_config
    return _parse_json(json.dumps(additional.get(KEY, {}) if isinstance(additional, dict) else {}))


@lru_cache(maxsize=8)
def _parse_json(text: str) -> Settings:
    """Parse once, because every layer asks."""
    return parse(json.loads(text))
