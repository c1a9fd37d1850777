"""The method and an adapter's policy as they stand on a command line: a preset, a file, and changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stem_attn.config import PRESETS, StemConfig, field_names
from stem_attn.lab.errors import InputError
from stem_attn.lab.inputs import read_text
from stem_attn.policy import PrefillPolicy, make_settings, parse_settings, policy_field_names, read_settings

# The published presets are made for long prompts: of a few thousand tokens their fixed minimum of 128-token blocks
# keeps nearly everything. Smaller blocks and a budget in proportion to the prompt keep 25% to 30%. Of so small a budget
# two full rows at the end take a fifth. With the default's tail, floor and decay along depth the demo's model has a KL
# of .095 at 4601 tokens, at density .31; with those of `default-0.1` .045, at .27.
DEMO = {
    "block_size": 64,
    "budget_ratio": 0.165,
    "budget_bias": 0,
    "tail_blocks": 2,
    "tail_ratio": 0.5,
    "head_floor": 0.5,
    "sink_blocks": 2,
    "local_blocks": 4,
    "min_seq_len": 1024,
    "depth_decay": 1.0,
}


def settings_from_options(
    preset: str,
    changes: Sequence[str],
    file: Path | None = None,
    own_presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[StemConfig, PrefillPolicy]:
    """Build a config and a policy from `--preset NAME --config FILE --set field=value ...`; what comes later replaces.

    Args:
        preset: Name of a preset.
        changes: `field=value` strings; see `read_changes`.
        file: A JSON object of fields; `-` is stdin.
        own_presets: Presets of the command alone, by name: what differs from the default.

    Raises:
        InputError: The preset or a field is unknown, a value is out of range, or the file cannot be read.
    """
    own = own_presets or {}
    if preset not in own and preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join((*own, *PRESETS))}")
    for text in changes:
        name, equals, _ = text.partition("=")
        if not equals or not name.strip():
            known = ", ".join((*field_names(), *policy_field_names()))
            raise InputError(f"--set takes field=value, got {text!r}; fields: {known}")
    fields = {**own.get(preset, {}), **(fields_from_file(file) if file is not None else {}), **read_changes(changes)}
    try:
        return make_settings(fields, preset if preset in PRESETS else "default")
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
    """Read a settings file, `-` being stdin; see `policy.read_settings`.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        return parse_settings(*read_text(path)) if str(path) == "-" else read_settings(path)
    except ValueError as error:
        raise InputError(str(error)) from error


def plain_settings(config: StemConfig, policy: PrefillPolicy) -> dict[str, Any]:
    """Return the fields of both as plain values: what a settings file holds.

    `crossover` is left out: it is about speed on one machine, and no property of what was measured.
    """
    of_policy = dataclasses.asdict(policy)
    del of_policy["crossover"]
    return {**json.loads(config.to_json()), **json.loads(json.dumps(of_policy))}
