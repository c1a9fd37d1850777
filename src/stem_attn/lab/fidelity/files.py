"""The files of `stem-attn eval fidelity`: the record, its tables and its plots."""

from __future__ import annotations

import json
from typing import Any

from stem_attn.lab.fidelity.plots import draw
from stem_attn.lab.fidelity.report import markdown
from stem_attn.lab.results import Record, to_csv

_DIGITS = 6


def contents(record: Record) -> dict[str, str | bytes]:
    """Return fidelity.json, fidelity.md, layers.csv, propagated.csv and the plots, by file name.

    Args:
        record: Settings, and rows under `"layers"` and `"propagated"`.
    """
    tables = {f"{name}.csv": to_csv([_columns(row) for row in record[name]]) for name in ("layers", "propagated")}
    return {"fidelity.json": _json(record), "fidelity.md": markdown(record), **tables, **draw(record)}


def _columns(row: Record) -> Record:
    return {name: _rounded(value) for name, value in row.items() if not isinstance(value, list)}


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
