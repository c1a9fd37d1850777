"""Every task by name, and the names of groups of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stem_attn.lab.tasks import (
    code_file,
    code_repo,
    code_sources,
    key_values,
    passage_count,
    passage_retrieval,
    passages,
    rounds,
)
from stem_attn.lab.tasks.measures import edit_similarity, exact_match, number_match, word_similarity
from stem_attn.lab.tasks.ruler.scoring import score as share_found
from stem_attn.lab.tasks.ruler.tasks import EXACT
from stem_attn.lab.tasks.ruler.tasks import TASKS as RULER
from stem_attn.lab.tasks.samples import Request, Sample
from stem_attn.lab.tasks.task import Task


def _code(samples: Callable[[Request], Iterator[Sample]]) -> Task:
    return Task(
        "code",
        samples,
        code_sources.NEW_TOKENS,
        edit_similarity,
        also={"exact_match": exact_match},
        sources=code_sources.sources,
        chat=False,
    )


TASKS: dict[str, Task] = {
    **RULER,
    "key_values": Task("retrieval", key_values.samples, key_values.NEW_TOKENS, share_found),
    "passage_retrieval": Task(
        "retrieval", passage_retrieval.samples, passage_retrieval.NEW_TOKENS, number_match, sources=passages.sources
    ),
    "passage_count": Task(
        "retrieval", passage_count.samples, passage_count.NEW_TOKENS, number_match, sources=passages.sources
    ),
    "rounds": Task("retrieval", rounds.samples, rounds.NEW_TOKENS, word_similarity),
    "code_file": _code(code_file.samples),
    "code_repo": _code(code_repo.samples),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "exact": EXACT,
    "ruler": tuple(RULER),
    "retrieval": tuple(name for name, task in TASKS.items() if task.family == "retrieval"),
    "code": tuple(name for name, task in TASKS.items() if task.family == "code"),
    "all": tuple(TASKS),
}
