"""The picture of answers: drift and agreement by density, a line a method and a column a family of tasks."""

from __future__ import annotations

import io
import json
from typing import Any

from stem_attn.lab.results import Record

# Colour-blind safe.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MEASURES = (("drift", "drift, nats a token"), ("agreement", "same answer as dense, %"))
_HOW_MUCH = ("density", "budget_scale")  # what methods of one line may differ in


def draw(found: Record) -> bytes:
    """Draw a report as a PNG.

    Args:
        found: The record that `stem-attn eval report --json` writes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    means = [row for row in found["means"] if row["drift"] is not None]
    families = list(dict.fromkeys(row["family"] for row in means))
    lines = lines_of(found["settings"]["methods"])
    size = 4.6 * max(len(families), 1), 7.4
    figure, axes = pyplot.subplots(2, max(len(families), 1), figsize=size, squeeze=False, layout="constrained")
    for column, family in enumerate(families):
        for panel, (measure, label) in zip(axes[:, column], _MEASURES, strict=True):
            for (name, members), color in zip(lines.items(), _COLORS * len(lines), strict=False):
                rows = [row for row in means if row["family"] == family and row["method"] in members]
                points = sorted((row["budget"], row[measure]["mean"], _half(row[measure])) for row in rows)
                if points:
                    x, y, half = zip(*points, strict=True)
                    panel.errorbar(x, y, half, color=color, marker="o", markersize=4, capsize=2, label=name)
            panel.set_xscale("log")
            for axis in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
                axis(FuncFormatter(lambda x, _: f"{x:g}"))
            panel.set_xlabel("kept over causal blocks")
            panel.set_ylabel(label)
            panel.grid(color="#dddddd", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        tasks = next(row["tasks"] for row in means if row["family"] == family)
        axes[0, column].set_title(f"{family} ({tasks} {'task' if tasks == 1 else 'tasks'})", fontsize=10)
        axes[0, column].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{found['model']}, seed {found['seed']}; bars: 95% intervals", fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    pyplot.close(figure)
    return image.getvalue()


def lines_of(methods: list[Record]) -> dict[str, set[str]]:
    """Return the methods that differ in nothing but how much they keep, by the name of their line; dense has none."""
    alike: dict[str, list[Record]] = {}
    for method in methods:
        if method["base"] != "dense":
            fields = {name: value for name, value in method["fields"].items() if name not in _HOW_MUCH}
            alike.setdefault(json.dumps([method["base"], fields], sort_keys=True), []).append(method)
    named: dict[str, set[str]] = {}
    for group in alike.values():
        names = [method["name"] for method in group]
        first = group[0]
        own = first["fields"].get("density") is None
        line = first["base"] if own and len(group) > 1 else names[0] if own else names[0].rpartition(" at ")[0]
        named.setdefault(line or names[0], set()).update(names)
    return named


def _half(estimate: Record) -> Any:
    """Return half of an estimate's interval; no bar where there is none."""
    return 0.0 if estimate["standard_error"] is None else (estimate["interval"][1] - estimate["interval"][0]) / 2
