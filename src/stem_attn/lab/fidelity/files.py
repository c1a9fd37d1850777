"""The files of `stem-attn eval fidelity`: the record, its tables and its plots."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from stem_attn.lab.fidelity.plots import write_plots
from stem_attn.lab.fidelity.report import Record, markdown

_DIGITS = 6


def write_files(record: Record, folder: Path) -> None:
    """Write fidelity.json, fidelity.md, layers.csv, propagated.csv and the plots.

    Args:
        record: Settings, and rows under `"layers"` and `"propagated"`.
        folder: Where; files that are there are replaced.
    """
    (folder / "fidelity.json").write_text(_json(record))
    (folder / "fidelity.md").write_text(markdown(record))
    for name in ("layers", "propagated"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            columns = [key for key, value in record[name][0].items() if not isinstance(value, list)]
            writer.writerow(columns)
            writer.writerows([_rounded(row[column]) for column in columns] for row in record[name])
    write_plots(record, folder)


def _json(record: Record) -> str:
    """Write settings indented and every row on a line of its own."""
    rows = {name: record[name] for name in ("propagated", "layers")}
    text = json.dumps({**record, "propagated": "@propagated", "layers": "@layers"}, indent=2)
    for name, listed in rows.items():
        lines = ",\n".join("    " + json.dumps(_rounded(row)) for row in listed)
        text = text.replace(f'"@{name}"', f"[\n{lines}\n  ]")
    return text + "\n"


def _rounded(value: Any) -> Any:
    """Round numbers to six significant digits, which is more than they are worth."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
