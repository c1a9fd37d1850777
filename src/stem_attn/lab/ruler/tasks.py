"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from stem_attn.lab.ruler import common_words, frequent_words, niah, tracking
from stem_attn.lab.ruler.samples import Request, Sample
from stem_attn.lab.ruler.templates import COMMON_WORDS, FREQUENT_WORDS, NIAH, VARIABLE_TRACKING


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Args:
        samples: Yields its samples, without end.
        new_tokens: Most tokens of an answer.
        essays: Whether its haystack is essays, for which another public text stands here.
    """

    samples: Callable[[Request], Iterator[Sample]]
    new_tokens: int
    essays: bool = False


def _niah(**settings: Any) -> Task:
    return Task(partial(niah.samples, **settings), NIAH.new_tokens, essays=settings["haystack"] == "essay")


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
    "vt": Task(tracking.samples, VARIABLE_TRACKING.new_tokens),
    "cwe": Task(common_words.samples, COMMON_WORDS.new_tokens),
    "fwe": Task(frequent_words.samples, FREQUENT_WORDS.new_tokens),
}
EXACT = tuple(name for name, task in TASKS.items() if not task.essays)
