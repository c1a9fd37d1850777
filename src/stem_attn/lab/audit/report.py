"""Show what audits found, a line a layer, and what they cost."""

from __future__ import annotations

from rich.console import Group, RenderableType

from stem_attn.lab.results import Record
from stem_attn.lab.tables import narrow_table, within_columns


def render(record: Record) -> RenderableType:
    """Return what the terminal shows."""
    numbers = ["density", "rows"]
    numbers += [f"{name} {part}" for name in ("recall", "error") for part in ("true", "mean", "+-", "held")]
    table = narrow_table("Audits of every layer against all rows", ["prompt", "layer"], numbers)
    for row in record["layers"]:
        cells = [str(row["prompt"]), str(row["layer"]), f"{row['density']:.3f}", str(row["rows"])]
        for name in ("recall", "error"):
            found = row[name]
            cells += [f"{found['true']:.4f}", f"{found['mean']:.4f}", f"{found['half_width']:.4f}"]
            cells.append(f"{found['held']:.0%}")
        table.add_row(*cells)
    lines = [
        f"{name}: {found['held']:.1%} of the 95% intervals hold the truth, the widest is +- {found['half_width']:.4f}"
        for name, found in record["summary"].items()
    ]
    lines.append(f"an audit multiplies {record['work_share']:.2%} of what dense attention does")
    if "times" in record:
        times = record["times"]
        lines += [f"{name}: {found['median']:.1f} ms" for name, found in times["ms"].items()]
        lines += [
            f"{name}: {found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"
            for name, found in times.items()
            if name != "ms"
        ]
    return within_columns(Group(table, "", *lines))
