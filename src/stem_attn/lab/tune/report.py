"""Show what `stem-attn tune` found: the layers' budgets, and what they save."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from stem_attn.lab.results import Record


def render(found: Record, path: str) -> Group:
    """Return what the terminal shows.

    Args:
        found: The record that `stem-attn tune` writes.
        path: Where the config went.
    """
    return Group(_layers(found["layers"]), Text(), _totals(found), Text(), *map(Text, _notes(found, path)))


def _layers(layers: list[Record]) -> Table:
    table = Table(title="Budgets by layer")
    for column in ("layer", "factor", "density", "attention error", "sensitivity, nats"):
        table.add_column(column, justify="right")
    for row in layers:
        nats = row["sensitivity_nats"]
        table.add_row(
            str(row["layer"]),
            f"{row['factor']:.3f}",
            f"{row['density']:.3f}",
            f"{row['error']:.4f}",
            "-" if nats is None else f"{nats:.2e}",
        )
    return table


def _totals(found: Record) -> Table:
    table = Table(title=f"All tuned layers together, target {found['settings']['target']}")
    answered = "drift_nats" in found["tuned"]
    answers = ("drift, nats", "same answers") if answered else ()
    for column in ("prompts", "budgets", "density", "KL, nats", "same top-1", *answers):
        table.add_column(column, justify="right" if column not in ("prompts", "budgets") else "left")
    rows = [("tuned on", "by layer", found["tuned"]), ("tuned on", "uniform", found["uniform"])]
    if "held_out" in found:
        held_out = found["held_out"]
        rows += [
            ("held out", "by layer", held_out["tuned"]),
            ("held out", "uniform", held_out["uniform"]),
            ("held out", "uniform, equal density", held_out["uniform_at_equal_density"]),
        ]
    for prompts, budgets, row in rows:
        cells = [f"{row['density']:.4f}", f"{row['kl_nats']:.3e}", f"{row['top1_agreement']:.4f}"]
        if answered:
            cells += [f"{row['drift_nats']:.3e}", f"{row['agreement']:.2f}"]
        table.add_row(prompts, budgets, *cells)
    return table


def _notes(found: Record, path: str) -> list[str]:
    at, target = found["density_at_target"], found["settings"]["target"]
    notes = []
    if found["only_dense"]:
        notes.append(f"No sparse budget reaches {target}. The config keeps everything: dense attention.")
    else:
        notes.append(
            f"{target} takes density {at['tuned']:.4f} by layer and {at['uniform']:.4f} uniform, both "
            f"interpolated: {at['tuned'] / at['uniform']:.3f} of it."
        )
    notes.append(f"{found['seconds']:g} s; {len(found['runs'])} choices of budgets tried. Written to {path}")
    return notes
