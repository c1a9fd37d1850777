"""Say what one chunk size and prompt length gave, in a line."""

from __future__ import annotations

from collections.abc import Iterable

from stem_attn.lab.results import Record

_NAMES = {"stem": "Stem", "by-request": "dense by request"}


def line(record: Record) -> str:
    """Return the medians of all sides, and what Stem counted."""
    first, later = record["first_token_seconds"], record["next_token_seconds"]
    text = f"{record['length']} tokens in chunks of {record['chunk']}: first token "
    text += ", ".join(f"{_NAMES.get(side, side)} {seconds:.3f} s" for side, seconds in first.items())
    if "stem" in first and len(first) > 1:
        dense = next(side for side in first if side != "stem")
        text += f", ratio {first[dense] / first['stem']:.2f}"
    text += f"; in the warm-up before, {_and(f'{x:.3f}' for x in record['warm_up_seconds'].values())} s"
    if None not in later.values():
        text += f"; each token after it {_and(f'{1000 * x:.2f}' for x in later.values())} ms"
    counted = next((runs[0]["stats"] for runs in record["runs"].values() if runs[0]["stats"] is not None), None)
    return text if counted is None else f"{text}; {counted}"


def _and(parts: Iterable[str]) -> str:
    return " and ".join(parts)
