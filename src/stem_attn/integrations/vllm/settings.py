"""How a user configures Stem in vLLM: `--additional-config '{"stem": {...}}'`, and whether it is selected.

And what one request may choose in their place, where the server lets it: see `per_request.py`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from stem_attn.config import PRESETS, StemConfig, field_names
from stem_attn.integrations.vllm.register import is_stem
from stem_attn.policy import PrefillPolicy, make_settings, policy_field_names, read_settings

KEY = "stem"
DENSE = "dense"
CHOOSER = "stem_attn.integrations.vllm.per_request:PerRequest"
_OWN_KEYS = ("preset", "config_file")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a user may set.

    Args:
        config: The method.
        policy: Which prompts and layers are sparse.
        preset: Name of the preset that both started from.
    """

    config: StemConfig
    policy: PrefillPolicy
    preset: str


def parse(given: Mapping[str, Any]) -> Settings:
    """Read the value of `additional_config["stem"]`.

    Fields of StemConfig and of PrefillPolicy may stand in it, and `preset` and `config_file` (a JSON object of such
    fields). A field given here replaces the file's, and the file's the preset's.

    Raises:
        ValueError: A key is unknown, a value is out of range, or the file cannot be read.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"additional_config[{KEY!r}] must be an object, got {type(given).__name__}")
    known = (*_OWN_KEYS, *field_names(), *policy_field_names())
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)} in additional_config[{KEY!r}]; known: {', '.join(known)}")
    preset = given.get("preset", "default")
    from_file = _read_file(given["config_file"]) if "config_file" in given else {}
    inline = {name: value for name, value in given.items() if name not in _OWN_KEYS}
    return Settings(*make_settings({**from_file, **inline}, preset), preset)


def choose(settings: Settings, asked: Any) -> Settings | None:
    """Return what a request's prompt is computed with.

    Args:
        settings: The server's. What is audited, and the target, stays what they say.
        asked: What the request says under `stem`: None, `dense`, a preset's name, or a factor on the server's budget.

    Returns:
        None: with dense attention.

    Raises:
        ValueError: It is none of these.
    """
    if asked is None:
        return settings
    if asked == DENSE:
        return None
    if isinstance(asked, str) and asked in PRESETS:
        return _preset(asked, settings.policy)
    if isinstance(asked, int | float) and not isinstance(asked, bool) and 0 < asked <= sys.float_info.max:
        return dataclasses.replace(settings, config=settings.config.scaled(asked))
    raise ValueError(
        f"{KEY!r} of a request must be {DENSE!r}, a preset ({', '.join(PRESETS)}) or a factor above 0 on the budget, "
        f"got {asked!r}"
    )


def choices(settings: Settings) -> list[Settings]:
    """Return the settings that requests may choose, the server's first. A factor on the budget has the same kernels."""
    return [settings, *(_preset(name, settings.policy) for name in PRESETS)]


@cache
def _preset(name: str, audits: PrefillPolicy) -> Settings:
    fields = {field: getattr(audits, field) for field in ("audit_rows", "min_recall", "max_error")}
    return Settings(*make_settings(fields, name), name)


def _read_file(path: Any) -> dict[str, Any]:
    if not isinstance(path, str):
        raise ValueError(f"config_file must be a path, got {path!r}")
    return read_settings(Path(path))


def describe(settings: Settings) -> str:
    """Return the preset and what differs from it, for the log."""
    config, policy = StemConfig.preset(settings.preset), PrefillPolicy.preset(settings.preset)
    both = [(settings.config, config, name) for name in field_names()]
    both += [(settings.policy, policy, name) for name in policy_field_names()]  # type: ignore[misc]
    changed = [
        f"{name}={getattr(mine, name)}" for mine, preset, name in both if getattr(mine, name) != getattr(preset, name)
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


def allows_choice(vllm_config: Any) -> bool:
    """Tell whether requests may choose their settings: where `PerRequest` checks them."""
    named = vllm_config.model_config.logits_processors or ()
    return CHOOSER in (one if isinstance(one, str) else f"{one.__module__}:{one.__qualname__}" for one in named)


@lru_cache(maxsize=8)
def _parse_json(text: str) -> Settings:
    """Parse once, because every layer asks."""
    return parse(json.loads(text))
