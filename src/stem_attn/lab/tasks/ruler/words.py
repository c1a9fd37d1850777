"""RULER's English words: the lists of the package `wonderwords`, read from its files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import overload

from stem_attn.lab.errors import require


def nouns() -> list[str]:
    """Return the nouns, in the package's order."""
    return _read("nounlist.txt")


def adjectives() -> list[str]:
    """Return the adjectives, in the package's order."""
    return _read("adjectivelist.txt")


def verbs() -> list[str]:
    """Return the verbs, in the package's order."""
    return _read("verblist.txt")


def _read(name: str) -> list[str]:
    require("wonderwords", extra="eval")
    lines = files("wonderwords.assets").joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line.rstrip() for line in lines]


class CompoundWords(Sequence[str]):
    """All distinct words `adjective-noun`, sorted, without holding the six million of them.

    Adjectives are grouped so that the groups' words follow one another: `high` and `high-pitched` share a group, since
    `high-priest` sorts after `high-pitched-ant`.

    Args:
        adjectives: First parts.
        nouns: Second parts.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._groups: list[list[str]] = []
        for first in sorted({f"{adjective}-" for adjective in adjectives}):
            if self._groups and first.startswith(self._groups[-1][0]):
                self._groups[-1].append(first)
            else:
                self._groups.append([first])
        self._merged = {i: self._merge(group) for i, group in enumerate(self._groups) if len(group) > 1}
        sizes = (len(self._merged.get(i, self._nouns)) for i in range(len(self._groups)))
        self._ends = list(accumulate(sizes))

    def _merge(self, group: list[str]) -> list[str]:
        return sorted({first + noun for first in group for noun in self._nouns})

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"word {index} of {len(self)}")
        group = bisect_right(self._ends, index)
        place = index - (self._ends[group - 1] if group else 0)
        if group in self._merged:
            return self._merged[group][place]
        return self._groups[group][0] + self._nouns[place]


@cache
def compound_words() -> CompoundWords:
    """Return the keys of RULER's needles."""
    return CompoundWords(adjectives(), nouns())
