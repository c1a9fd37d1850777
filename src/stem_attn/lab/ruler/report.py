"""Show RULER's scores: one table of methods by length, one of tasks."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from stem_attn.lab import machine
from stem_attn.lab.results import Record


def render(found: Record) -> Group:
    """Return what the terminal shows.

    Args:
        found: The record that `stem-attn eval ruler --json` writes.
    """
    notes = [Text(note, style="dim") for note in _notes(found)]
    return Group(_facts(found), Text(), _methods(found), Text(), _tasks(found), *notes)


def _facts(found: Record) -> Table:
    settings = found["settings"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("model", f"{found['model']}, {found['dtype']}")
    facts.add_row("machine", machine.in_words(found["machine"]))
    form = "the model's chat format" if settings["chat"] else "plain text"
    facts.add_row("prompts", f"{settings['samples']} a task and length, seed {settings['seed']}, {form}")
    density = settings["density"]
    budget = (
        "each method's own" if density is None else f"{density:g} of the causal blocks in every layer, or just below"
    )
    facts.add_row("budget", f"{budget}; blocks of {settings['block_size']} tokens unless a method says otherwise")
    return facts


def _methods(found: Record) -> Table:
    """One row a method: the score at every length, as in the paper's Table 4."""
    table = Table(title="Score, mean over tasks")
    table.add_column("method")
    for length in found["settings"]["lengths"]:
        table.add_column(_tokens(length), justify="right")
    for name in ("average", "budget", "minus dense, points"):
        table.add_column(name, justify="right")
    for row in found["methods"]:
        scores = [_number(row["by_length"].get(length)) for length in found["settings"]["lengths"]]
        budget = _number(row["budget"], ".0%")
        table.add_row(row["method"], *scores, _number(row["average"]), budget, _difference(row))
    return table


def _tasks(found: Record) -> Table:
    table = Table(title="Score by task; for sparse methods minus dense, points")
    table.add_column("task")
    table.add_column("method")
    lengths = found["settings"]["lengths"]
    for length in lengths:
        table.add_column(_tokens(length), justify="right")
    cells = {(cell["task"], cell["method"], cell["length"]): cell for cell in found["cells"]}
    for task in found["settings"]["tasks"]:
        for number, row in enumerate(found["methods"]):
            shown = [_cell(cells.get((task, row["method"], length))) for length in lengths]
            last = number == len(found["methods"]) - 1
            table.add_row("" if number else task, row["method"], *shown, end_section=last)
    return table


def _cell(cell: Record | None) -> str:
    if cell is None:
        return "-"
    return _number(cell["score"]) + (f"  {_difference(cell)}" if cell["minus_dense"] is not None else "")


def _difference(row: Record) -> str:
    if row["minus_dense"] is None:
        return "-"
    interval = row["interval"]
    half = "" if interval is None else f"±{(interval[1] - interval[0]) / 2:.1f}"
    return f"{row['minus_dense']:+.1f}{half}"


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _notes(found: Record) -> list[str]:
    notes = [
        "Budget: kept over causal blocks of the layers with full attention, dense ones included. Differences are "
        "paired by prompt; ± is half of their 95% interval, by the normal approximation.",
    ]
    if found["essays"] is not None:
        notes.append(f"Essay tasks: their haystack is {found['essays']}, not NVIDIA's essays.")
    for layers in found["layers"]:
        others = {reason: count for reason, count in layers["layers"].items() if reason != "sparse"}
        if others:
            listed = ", ".join(f"{count:g} {reason}" for reason, count in others.items())
            notes.append(f"{layers['method']} at {layers['length']}: layers that did not run sparse: {listed}.")
    notes += [f"{out['method']} at {out['length']}: left out: {out['reason']}." for out in found["left_out"]]
    return notes
