"""Frequent words extraction (fwe): the three most frequent coded words, whose counts follow a zeta distribution."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator

import numpy as np

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks.ruler.templates import FREQUENT_WORDS
from stem_attn.lab.tasks.samples import Request, Sample

_LETTERS = 6
_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # zeta(_ALPHA)
_ASKED = 3


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The task does not fit the length.
    """
    rng = random.Random(request.seed)
    most = request.length - FREQUENT_WORDS.new_tokens
    vocabulary, step = most // 50, most // 32

    def draw_words() -> list[str]:
        def word() -> str:
            return "".join(rng.choices(string.ascii_lowercase, k=_LETTERS))

        words = [word() for _ in range(vocabulary)]
        while len(set(words)) < vocabulary:
            words.append(word())
        words = sorted(set(words))
        random.Random(request.seed).shuffle(words)
        return ["...", *words[1:]]  # the most frequent "word" is noise

    def prompt(words: list[str], size: int) -> Sample:
        counts = size * np.arange(1, len(words) + 1) ** -_ALPHA / _ZETA
        coded = [word for word, count in zip(words, counts.astype(int), strict=True) for _ in range(count)]
        random.Random(request.seed).shuffle(coded)
        question = FREQUENT_WORDS.question.format(context=" ".join(coded))
        whole = request.frame.wrap(question, FREQUENT_WORDS.answer_prefix)
        return request.sample(whole, words[1 : 1 + _ASKED])

    if vocabulary <= _ASKED or prompt([], 0).prompt_tokens > most:
        raise InputError(f"fwe does not fit {request.length} tokens; use longer --lengths")
    words = draw_words()
    size = most // _LETTERS
    while prompt(words, size).prompt_tokens < most:
        size += step
    size -= step
    while True:
        words = draw_words()
        smaller = size
        while (sample := prompt(words, smaller)).prompt_tokens > most:
            smaller -= step
        yield sample
