"""What a task is to the harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stem_attn.lab.tasks.samples import Request, Sample

Measure = Callable[[str, Sequence[str]], float]
"""Compares an answer with its references, in percent."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Args:
        family: What it is averaged with.
        samples: Yields its samples, without end.
        new_tokens: Most tokens of an answer.
        score: What tables show and means are taken of.
        also: Further measures by name.
        sources: Returns the names of the texts that its prompts are made of, where there are any.
        chat: Whether its prompt may go into a model's chat format; not where the model continues a text.
    """

    family: str
    samples: Callable[[Request], Iterator[Sample]]
    new_tokens: int
    score: Measure
    also: Mapping[str, Measure] = field(default_factory=dict)
    sources: Callable[[], list[str]] | None = None
    chat: bool = True
