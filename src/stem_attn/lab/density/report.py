"""Show presets at equal density: a line a preset, length and density."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from stem_attn.lab.results import Record

_PARTS = ("selection", "attention", "whole")


def render(records: Sequence[Record]) -> Table:
    """Return what the terminal shows."""
    table = Table(title="Milliseconds, medians", title_justify="left", header_style="bold")
    table.add_column("preset")
    for name in ("tokens", "density", *_PARTS, f"whole over {records[0]['preset']}"):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(
            record["preset"],
            str(record["tokens"]),
            f"{record['density']:.4f}",
            *(f"{record['ms'][part]['median']:.3f}" for part in _PARTS),
            f"{record['whole_over_first']:.3f}",
        )
    return table
