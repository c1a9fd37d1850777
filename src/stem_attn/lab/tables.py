"""Tables for terminals that are not wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.table import Table

COLUMNS = 100


def narrow_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Begin a table that spends little room between its columns.

    Args:
        title: Above it.
        words: Headers of the first columns; they fold where there is no room.
        numbers: Headers of the others.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def within_columns(view: RenderableType) -> Constrain:
    """Keep what a report drew within `COLUMNS`, in piped output and in a wider terminal too."""
    return Constrain(view, COLUMNS)
