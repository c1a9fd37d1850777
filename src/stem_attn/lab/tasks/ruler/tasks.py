"""RULER's tasks by name."""

from __future__ import annotations

from functools import partial
from typing import Any

from stem_attn.lab.prompts import public_text
from stem_attn.lab.tasks.ruler import common_words, frequent_words, niah, tracking
from stem_attn.lab.tasks.ruler.scoring import score
from stem_attn.lab.tasks.ruler.templates import COMMON_WORDS, FREQUENT_WORDS, NIAH, VARIABLE_TRACKING
from stem_attn.lab.tasks.task import Task

FAMILY = "RULER"


def essays() -> list[str]:
    """Return the name of the text that stands for NVIDIA's essays."""
    return [f"{public_text()[1]}, not NVIDIA's essays"]


def _niah(**settings: Any) -> Task:
    sources = essays if settings["haystack"] == "essay" else None
    return Task(FAMILY, partial(niah.samples, **settings), NIAH.new_tokens, score, sources=sources)


# scripts/synthetic.yaml of NVIDIA/RULER has the same; its two question-answering tasks need data that no package has.
TASKS: dict[str, Task] = {
    "niah_single_1": _niah(haystack="noise"),
    "niah_single_2": _niah(haystack="essay"),
    "niah_single_3": _niah(haystack="essay", values="uuids"),
    "niah_multikey_1": _niah(haystack="essay", num_keys=4),
    "niah_multikey_2": _niah(haystack="needle"),
    "niah_multikey_3": _niah(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": _niah(haystack="essay", num_values=4),
    "niah_multiquery": _niah(haystack="essay", num_queries=4),
    "vt": Task(FAMILY, tracking.samples, VARIABLE_TRACKING.new_tokens, score),
    "cwe": Task(FAMILY, common_words.samples, COMMON_WORDS.new_tokens, score),
    "fwe": Task(FAMILY, frequent_words.samples, FREQUENT_WORDS.new_tokens, score),
}
EXACT = tuple(name for name, task in TASKS.items() if task.sources is None)
