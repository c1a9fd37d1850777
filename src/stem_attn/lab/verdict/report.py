"""The page of `stem-attn report`."""

from __future__ import annotations

from collections.abc import Sequence

from stem_attn.lab import machine, web
from stem_attn.lab.results import Record
from stem_attn.lab.verdict.read import Evidence
from stem_attn.lab.verdict.run import CLOSE, FASTER, POINTS, SAME, Judgement, headline


def page(found: Evidence, judgements: Sequence[Judgement]) -> str:
    """Return the page."""
    return web.render(
        "verdict/page.html",
        headline=headline(judgements),
        judgements=judgements,
        speeds=sorted(found.speeds, key=lambda one: (one.length, one.kind, one.settings)),
        accuracies=sorted(found.accuracies, key=lambda one: (one.length, not one.is_stem, one.method, one.density)),
        files=[_file(name, record) for name, record in found.records.items()],
        ignored=found.ignored,
        limits={"faster": FASTER, "same": SAME, "close": CLOSE, "points": POINTS},
    )


def _file(name: str, record: Record) -> Record:
    return {
        "name": name,
        "command": record["command"],
        "date": record["date"],
        "version": record["machine"]["versions"]["stem-attn"],
        "machine": machine.in_words(record["machine"]),
        "arguments": record["arguments"],
        "settings": record["settings"],
    }
