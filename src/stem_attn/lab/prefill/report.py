"""Show a prefill comparison as one table and two answers."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stem_attn.config import StemConfig
from stem_attn.lab import machine
from stem_attn.lab.configs import plain_settings
from stem_attn.lab.results import Record
from stem_attn.policy import PrefillPolicy

_MIB = 2**20


def render(found: Record) -> Group:
    """Return what the terminal shows.

    Args:
        found: The record that `stem-attn prefill --json` writes.
    """
    parts: list[Any] = [_facts(found), Text(), _table(found), *(Text(note, style="dim") for note in _notes(found))]
    question = found["prompt"]["question"]
    if question is not None:
        parts += [Text(), Text.assemble(("question  ", "bold"), question)]
    for side in ("dense", "stem"):
        parts += [Text(), Text(f"answer, {side}", style="bold"), Padding(Text(found[side]["answer"].strip()), (0, 2))]
        if (right := found[side]["answer_right"]) is not None:
            verdict = "right" if right else "wrong"
            answer = found["prompt"]["needle"]["answer"]
            parts.append(Text(f"  {verdict}: the text says {answer}", style="green" if right else "red"))
    return Group(*parts)


def _facts(found: Record) -> Table:
    prompt, settings = found["prompt"], found["settings"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("model", f"{found['model']}, {found['dtype']}, {found['layers']} layers")
    facts.add_row("machine", machine.in_words(found["machine"]))
    cut = ", cut to fit" if prompt["cut"] else ""
    facts.add_row("prompt", f"{prompt['tokens']} tokens of {prompt['source']}{cut}")
    if prompt["needle"] is not None:
        needle = prompt["needle"]
        facts.add_row("needle", f'"{needle["sentence"]}" inserted at {needle["depth"]:.0%} of the text')
    facts.add_row("config", f"preset {settings['preset']}; {_differences(settings['config'])}")
    return facts


def _differences(config: dict[str, Any]) -> str:
    """Name the fields that say how much is kept, and those that differ from the package's default."""
    default = plain_settings(StemConfig(), PrefillPolicy())
    always = ("block_size", "budget_ratio", "budget_bias", "decay")
    names = [name for name in config if name in always or config[name] != default[name]]
    return ", ".join(f"{name}={_plain(config[name])}" for name in names)


def _plain(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and value[0][0] is None:  # a budget_ratio of one step
        return f"{value[0][1]:g}"
    return json.dumps(value) if isinstance(value, list) else str(value)


def _table(found: Record) -> Table:
    dense, stem = found["dense"], found["stem"]
    table = Table()
    table.add_column()
    for name in ("dense", "stem", "dense / stem"):
        table.add_column(name, justify="right")

    def row(name: str, left: float, right: float, form: str) -> None:
        ratio = f"{left / right:.2f}x" if right else "-"
        table.add_row(name, format(left, form), format(right, form), ratio)

    row("prefill, s (time to first token)", dense["prefill_seconds"], stem["prefill_seconds"], ".2f")
    row("attention, s", dense["attention_seconds"], stem["attention_seconds"], ".2f")
    row(f"density, {found['sparse_layers']} sparse layers", 1.0, found["density"], ".3f")
    row("peak memory over the model, MiB", dense["peak_bytes"] / _MIB, stem["peak_bytes"] / _MIB, ".0f")
    row("perplexity of the prompt", dense["perplexity"], stem["perplexity"], ".3f")
    table.add_row("same top-1 token", "", f"{found['top1_agreement']:.2%}", "")
    table.add_row("mean KL(dense || stem), nats", "", f"{found['mean_kl_nats']:.4f}", "")
    return table


def _notes(found: Record) -> list[str]:
    rounds = len(found["dense"]["rounds_seconds"])
    notes = [f"Seconds: the faster of {rounds} rounds in turns. Memory: {found['memory_method']}."]
    if found["other_layers"]:
        others = ", ".join(f"{count} ({reason})" for reason, count in found["other_layers"].items())
        notes.append(f"Layers that did not run sparse: {others}.")
    return notes
