"""Show scores and comparisons: one table of methods by family of tasks, one of tasks."""

from __future__ import annotations

from rich.console import Group
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from stem_attn.lab.results import Record
from stem_attn.lab.tables import narrow_table, within_columns

_COMPARISONS = ("minus\ndense", "same\nanswer", "drift")
_FEW_LENGTHS = 2  # with more, the comparisons do not fit beside the scores


def render(found: Record) -> Constrain:
    """Return what the terminal shows.

    Args:
        found: The record that `stem-attn eval tasks --json` or `eval report --json` writes.
    """
    notes = [Text(note, style="dim") for note in _notes(found)]
    means = [part for table in _means(found) for part in (table, Text())]
    return within_columns(Group(_facts(found), Text(), *means, _tasks(found), *notes))


def _facts(found: Record) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("model", f"{found['model']}, {found['dtype']}, {'; '.join(found['machines'])}")
    form = "the model's chat format, but for code" if found["chat"] else "plain text"
    facts.add_row("prompts", f"seed {found['seed']}, {form}")
    return facts


def _means(found: Record) -> list[Table]:
    """One row a family and method: the score at every length, as in the paper's Table 4, and the comparisons."""
    rows = found["means"]
    if not rows:
        return []
    lengths = sorted({cell["length"] for cell in found["cells"]})
    names, score_names, comparison_names = (
        ("tasks", "method"),
        (*map(_tokens, lengths), "average"),
        ("budget", *_COMPARISONS),
    )
    if len(lengths) <= _FEW_LENGTHS:
        tables = [narrow_table("Mean over tasks", names, (*score_names, *comparison_names))]
    else:
        tables = [
            narrow_table("Mean over tasks", names, score_names),
            narrow_table("Mean over tasks and lengths, compared with dense", names, comparison_names),
        ]
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1]["family"] != row["family"]
        last = number == len(rows) - 1 or rows[number + 1]["family"] != row["family"]
        words = (f"{row['family']} ({row['tasks']})" if first else "", row["method"])
        scores = (*(_number(row["by_length"].get(length)) for length in lengths), _number(row["average"]))
        comparisons = (_number(row["budget"], ".1%"), *_comparisons(row))
        parts = [(*scores, *comparisons)] if len(tables) == 1 else [scores, comparisons]
        for table, cells in zip(tables, parts, strict=True):
            table.add_row(*words, *cells, end_section=last)
    return tables


def _tasks(found: Record) -> Table:
    table = narrow_table("By task", ("task", "method"), ("length", "samples", "score", "budget", *_COMPARISONS))
    cells = sorted(found["cells"], key=lambda cell: list(found["tasks"]).index(cell["task"]))
    for number, cell in enumerate(cells):
        first = number == 0 or cells[number - 1]["task"] != cell["task"]
        last = number == len(cells) - 1 or cells[number + 1]["task"] != cell["task"]
        table.add_row(
            cell["task"] if first else "",
            cell["method"],
            _tokens(cell["length"]),
            str(cell["samples"]),
            _number(cell["score"]),
            _number(cell["budget"], ".1%"),
            *_comparisons(cell),
            end_section=last,
        )
    return table


def _comparisons(row: Record) -> tuple[str, str, str]:
    return _estimate(row["minus_dense"], "+.1f"), _estimate(row["agreement"], ".0f"), _estimate(row["drift"], ".3f")


def _estimate(estimate: Record | None, form: str) -> str:
    if estimate is None:
        return "-"
    interval = estimate["interval"]
    half = "" if interval is None else f"±{format((interval[1] - interval[0]) / 2, form.removeprefix('+'))}"
    return f"{format(estimate['mean'], form)}{half}"


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _notes(found: Record) -> list[str]:
    notes = [
        "Budget: kept over causal blocks of the layers with full attention, dense ones included. Comparisons are with "
        "dense attention on the same prompts: the score's difference in points, the percentage of equal answers, and "
        "drift, the log-probability in nats a token that dense attention's own answer loses. ± is half of a 95% "
        "interval, by the normal approximation.",
    ]
    for task, sources in found["tasks"].items():
        if sources:
            notes.append(f"{task}: made of {'; '.join(sources)}.")
    notes += [
        f"{left['task']} at {left['length']}: in no mean, since dense attention itself has {left['dense']:.1f}."
        for left in found["not_in_means"]
    ]
    for layers in found["layers"]:
        others = {reason: count for reason, count in layers["layers"].items() if reason != "sparse"}
        if others:
            listed = ", ".join(f"{count:g} {reason}" for reason, count in others.items())
            notes.append(f"{layers['method']} at {layers['length']}: layers that did not run sparse: {listed}.")
    notes += [
        f"{method}: brought to one density in every layer, so without the depth_decay that it has otherwise."
        for method in found["layers_alike"]
    ]
    notes += [f"{out['method']} at {out['length']}: left out: {out['reason']}." for out in found.get("left_out", [])]
    if found.get("stopped"):
        notes.append("Stopped after --minutes: a further run with the same --out goes on.")
    return notes
