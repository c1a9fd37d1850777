"""Passages of public documentation that every installation has: what retrieval and counting are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from stem_attn.lab.prompts import public_text
from stem_attn.lab.texts import torch_pages

_LEAST_WORDS, _MOST_WORDS = 120, 240
_HEADING_TOKENS = 8  # a passage's number and the empty line after it, at most


@cache
def passages() -> tuple[str, ...]:
    """Return distinct passages of 120 to 240 words, each of whole paragraphs.

    They come from Python's language reference (PSF-2.0), as `help()` shows it, and from the reference pages of PyTorch
    (BSD-3-Clause).
    """
    return tuple(dict.fromkeys(passage for text, _ in (public_text(), torch_pages()) for passage in _cut(text)))


def sources() -> list[str]:
    """Return the names of the texts that passages come from, with their licences."""
    return [f"{public_text()[1]}, PSF-2.0", f"{torch_pages()[1]}, BSD-3-Clause"]


def fitting(drawn: Iterable[str], room: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Return the first passages that fit into a number of tokens, numbers included; all if there are too few."""
    taken = []
    for passage in drawn:
        room -= count_tokens(passage) + _HEADING_TOKENS
        if room < 0:
            break
        taken.append(passage)
    return taken


def numbered(drawn: Iterable[str]) -> str:
    """Return passages as paragraphs with numbers, from 1."""
    return "\n\n".join(f"Paragraph {number}: {passage}" for number, passage in enumerate(drawn, start=1))


def _cut(text: str) -> list[str]:
    """Join paragraphs, in order, to passages; what is too long or left over is dropped."""
    found: list[str] = []
    joined: list[str] = []
    words = 0
    for paragraph in text.split("\n\n"):
        count = len(paragraph.split())
        if words + count > _MOST_WORDS:
            joined, words = [], 0
            if count > _MOST_WORDS:
                continue
        joined.append(" ".join(paragraph.split()))
        words += count
        if words >= _LEAST_WORDS:
            found.append(" ".join(joined))
            joined, words = [], 0
    return found
