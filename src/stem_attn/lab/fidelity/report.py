"""Turn the record of `stem-attn eval fidelity` into numbers, Markdown tables for a page, and the terminal's view."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from stem_attn.lab import machine
from stem_attn.lab.results import Record
from stem_attn.lab.tables import narrow_table, within_columns

REFERENCE = "stem-official"

_MEASURES = ("error", "recall", "KL, nats", "top-1", "perplexity, change")


@dataclass(frozen=True, slots=True)
class Summary:
    """One method at one density, all prompts together.

    Args:
        method: Its name.
        target: The density asked for; None: as published.
        density: The density that all layers of the sparse forward had together.
        error: Geometric mean over layers and prompts of the attention output error.
        error_by_layer: The same, by layer.
        error_by_position: The same, by eighth of the prompt.
        recall: Mean attention probability on kept blocks.
        kl_nats: Mean KL(dense || sparse).
        kl_by_prompt: Its means prompt by prompt.
        kl_by_position: Its means by eighth of the prompt.
        top1_agreement: Share of positions with the same most likely token.
        dense_perplexity: Over all prompts.
        perplexity_change: Sparse minus dense perplexity.
    """

    method: str
    target: float | None
    density: float
    error: float
    error_by_layer: dict[int, float]
    error_by_position: list[float]
    recall: float
    kl_nats: float
    kl_by_prompt: list[float]
    kl_by_position: list[float]
    top1_agreement: float
    dense_perplexity: float
    perplexity_change: float


def summarize(record: Record) -> dict[tuple[str, float | None], Summary]:
    """Summarise every (method, target density) of a record, in the order measured."""
    layers: dict[tuple[str, float | None], list[Record]] = {}
    runs: dict[tuple[str, float | None], list[Record]] = {}
    for rows, groups in ((record["layers"], layers), (record["propagated"], runs)):
        for row in rows:
            groups.setdefault((row["method"], row["target"]), []).append(row)
    return {key: _summary(*key, layers[key], runs[key]) for key in runs}


def markdown(record: Record) -> str:
    """Return all tables of a record as Markdown."""
    found = summarize(record)
    tests = record["paper_tests"]
    sections = ["# Fidelity\n\n" + _setting(record)]
    for density in record["settings"]["densities"]:
        rows = [found[name, density] for name in record["methods"] if (name, density) in found]
        if rows:
            sections.append(f"## Density {density:g}\n\n{_comparison(rows, found.get((REFERENCE, density)))}")
            sections.append(f"By position, density {density:g} (eighths of the prompt):\n\n{_positions(rows)}")
    published = [summary for (_, target), summary in found.items() if target is None]
    if published:
        sections.append(f"## As published, whatever density results\n\n{_comparison(published, None)}")
    for test in tests.values():
        sections.append(f"## {test['title']}\n\n{_paper_test(test, found)}")
    if record["unreachable"]:
        lines = [f"- {each['method']} at {each['target']}: {each['reason']}" for each in record["unreachable"]]
        sections.append("## Left out\n\n" + "\n".join(lines))
    return "\n\n".join(sections) + "\n"


def render(record: Record, page: str) -> Constrain:
    """Return what the terminal shows: the means of every method.

    Args:
        record: What the command writes as JSON.
        page: Name of the file with all tables.
    """
    found = summarize(record)
    parts: list[Text | Table] = []
    for density in (*record["settings"]["densities"], None):
        rows = [found[name, density] for name in record["methods"] if (name, density) in found]
        if rows:
            title = "As published, at whatever density results" if density is None else f"Density {density:g}"
            reference = None if density is None else found.get((REFERENCE, density))  # other densities: no comparison
            parts += [_narrow(title, rows, reference), Text()]
    parts += [
        Text(f"{each['method']} at {each['target']} is left out: {each['reason']}", style="dim")
        for each in record["unreachable"]
    ]
    parts.append(Text(f"By layer and position, and the paper's tests: {page}", style="dim"))
    return within_columns(Group(*parts))


def _narrow(title: str, rows: Sequence[Summary], reference: Summary | None) -> Table:
    numbers = (
        "density",
        "error",
        "recall",
        "KL,\nnats",
        "top-1",
        "perplexity,\nchange",
        "error /\nofficial",
        "KL /\nofficial",
    )
    table = narrow_table(title, ("method",), numbers)
    for one in rows:
        ratios = ("-", "-")
        if reference is not None:
            error, kl = _ratio(one.error, reference.error), _ratio(one.kl_nats, reference.kl_nats)
            ratios = (f"{error:.3f}", f"{kl:.3f}")
        table.add_row(one.method, f"{one.density:.4f}", *_numbers(one), *ratios)
    return table


def ratio_to(reference: Summary, summary: Summary) -> tuple[float, float, int]:
    """Compare the layer errors of two methods.

    Returns:
        The ratio of the geometric means over layers, the largest ratio of a layer, and that layer.
    """
    ratios = {layer: _ratio(error, reference.error_by_layer[layer]) for layer, error in summary.error_by_layer.items()}
    worst = max(ratios, key=lambda layer: ratios[layer])
    return _ratio(summary.error, reference.error), ratios[worst], worst


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _summary(method: str, target: float | None, layers: list[Record], runs: list[Record]) -> Summary:
    by_layer: dict[int, list[float]] = {}
    for row in layers:
        by_layer.setdefault(row["layer"], []).append(row["error"])
    dense_nll, sparse_nll = (_mean(row[name] for row in runs) for name in ("dense_nll", "sparse_nll"))
    return Summary(
        method=method,
        target=target,
        density=_mean(row["density"] for row in runs),
        error=_geometric(row["error"] for row in layers),
        error_by_layer={layer: _geometric(errors) for layer, errors in sorted(by_layer.items())},
        error_by_position=[_geometric(column) for column in _columns(layers, "error_by_position")],
        recall=_mean(row["recall"] for row in layers),
        kl_nats=_mean(row["kl_nats"] for row in runs),
        kl_by_prompt=[row["kl_nats"] for row in runs],
        kl_by_position=[_mean(column) for column in _columns(runs, "kl_by_position")],
        top1_agreement=_mean(row["top1_agreement"] for row in runs),
        dense_perplexity=math.exp(dense_nll),
        perplexity_change=math.exp(sparse_nll) - math.exp(dense_nll),
    )


def _setting(record: Record) -> str:
    settings, model = record["settings"], record["model"]
    texts = "\n".join(
        _wrapped(
            f"- {text['tokens']} tokens of {text['source']}, from character {text['first_character']} "
            f"(sha256 `{text['sha256'][:16]}`)"
        )
        for text in record["texts"]
    )
    others = ", ".join(f"{reason}: {calls} layers" for reason, calls in record["other_calls"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items())
    setting = (
        f"{model['name']}, {model['dtype']}, {settings['length']} tokens, block {settings['block_size']}, "
        f"{model['measured_layers']} full attention layers measured"
        + (f" (left exact: {others})" if others else "")
        + f". {machine.name(record['machine'])}; {versions}."
    )
    return f"{_wrapped(setting)}\n\nPrompts:\n\n{texts}"


def _wrapped(prose: str) -> str:
    """Break a paragraph or an item of a list into lines of at most 100 characters."""
    indent = "  " if prose.startswith("- ") else ""
    return textwrap.fill(prose, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _comparison(rows: Sequence[Summary], reference: Summary | None) -> str:
    header = ["method", "density", *_MEASURES]
    if reference is not None:
        header += ["error / official", "worst layer", "KL / official"]
    lines = []
    for one in rows:
        line = [f"`{one.method}`", f"{one.density:.4f}", *_numbers(one)]
        if reference is not None:
            error, worst, layer = ratio_to(reference, one)
            line += [f"{error:.3f}", f"{worst:.3f} ({layer})", _kl_ratio(reference, one)]
        lines.append(line)
    return table(header, lines)


def _kl_ratio(reference: Summary, one: Summary) -> str:
    """Return the ratio of the mean KLs and, in brackets, the smallest and the largest ratio of a prompt."""
    by_prompt = [_ratio(kl, base) for kl, base in zip(one.kl_by_prompt, reference.kl_by_prompt, strict=True)]
    spread = f" ({min(by_prompt):.3f} to {max(by_prompt):.3f})" if len(by_prompt) > 1 else ""
    return f"{_ratio(one.kl_nats, reference.kl_nats):.3f}{spread}"


def _numbers(one: Summary) -> list[str]:
    return [
        f"{one.error:.4f}",
        f"{one.recall:.4f}",
        f"{one.kl_nats:.5f}",
        f"{one.top1_agreement:.2%}",
        f"{one.dense_perplexity:.3f} {one.perplexity_change:+.4f}",
    ]


def _positions(rows: Sequence[Summary]) -> str:
    bins = len(rows[0].kl_by_position)
    lines = []
    for one in rows:
        lines.append([f"`{one.method}` error", *(f"{value:.3f}" for value in one.error_by_position)])
        lines.append([f"`{one.method}` KL", *(f"{value:.4f}" for value in one.kl_by_position)])
    return table(["", *(str(i + 1) for i in range(bins))], lines)


def _paper_test(test: Record, found: dict[tuple[str, float | None], Summary]) -> str:
    lines = []
    for density in test["densities"]:
        for label, name in test["methods"]:
            if (name, density) in found:
                one = found[name, density]
                lines.append([label, f"{one.density:.4f}", *_numbers(one), f"{one.kl_by_position[-1]:.5f}"])
    return table(["", "density", "error", "recall", "KL, nats", "top-1", "perplexity", "KL in the last eighth"], lines)


def _columns(rows: list[Record], name: str) -> Iterable[tuple[float, ...]]:
    return zip(*(row[name] for row in rows), strict=True)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _geometric(values: Iterable[float]) -> float:
    listed = list(values)
    return math.exp(_mean(map(math.log, listed))) if min(listed) > 0 else 0.0


def _ratio(value: float, base: float) -> float:
    return value / base if base else math.nan
