"""Needle in a haystack: facts hidden in noise, in essays or among other facts, one or more of which are asked for."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import numpy as np

from stem_attn.lab.prompts import public_text
from stem_attn.lab.tasks.ruler.templates import NEEDLE, NIAH, NOISE
from stem_attn.lab.tasks.ruler.words import compound_words
from stem_attn.lab.tasks.samples import Request, Sample, draw_fitting, largest_size

Kind = Literal["words", "numbers", "uuids"]
Haystack = Literal["noise", "essay", "needle"]

_DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]  # percent, where needles go in essays


def samples(
    request: Request,
    *,
    haystack: Haystack,
    keys: Kind = "words",
    values: Kind = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Iterator[Sample]:
    """Yield the samples of one task, without end.

    Args:
        request: Length, seed, chat format and tokenizer.
        haystack: What the needles are hidden in: repeated noise sentences, essays, or other needles.
        keys: What the needles are named by.
        values: What the needles hold.
        num_keys: Needles with a key of their own.
        num_values: Needles for each key.
        num_queries: Keys that are asked for.

    Raises:
        InputError: The task does not fit the length.
    """
    rng = random.Random(request.seed)
    num_keys = max(num_keys, num_queries)

    def draw(kind: Kind) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "words":
            return rng.choice(compound_words())
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=values, key=key, value=value)

    def context(needles: list[str], size: int) -> str:
        if haystack == "essay":
            return _among_sentences(needles, _sentences(size), rng)
        lines = [NOISE] * size if haystack == "noise" else [needle(draw(keys), draw(values)) for _ in range(size)]
        for place, text in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, text)
        return "\n".join(lines)

    question, prefix, noun = NIAH.question, NIAH.answer_prefix, str(values)
    if num_queries * num_values == 1:
        question, prefix, noun = _singular(question), _singular(prefix), noun[:-1]

    def prompt(size: int) -> Sample:
        # The order of the draws is NVIDIA's, so that a seed gives the same prompts.
        facts: list[tuple[str, list[str]]] = []
        for _ in range(num_keys):
            key = draw(keys)
            facts.append((key, [draw(values) for _ in range(num_values)]))
        needles = [needle(key, value) for key, held in facts for value in held]
        random.Random(request.seed).shuffle(needles)
        text = context(needles, size)
        asked = [facts[i] for i in rng.sample(range(num_keys), num_queries)]
        names = [key for key, _ in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        fields = {"type_needle_v": noun, "context": text, "query": query}
        whole = request.frame.wrap(question.format(**fields), prefix.format(**fields))
        return request.sample(whole, [value for _, held in asked for value in held])

    step = 500 if haystack == "essay" else 25 if request.length >= 4096 else 5
    tokens_each = prompt(step).prompt_tokens / step
    most = request.length - NIAH.new_tokens
    size = largest_size(
        lambda n: prompt(n).prompt_tokens,
        most_tokens=most,
        step=step,
        upper=int(request.length / tokens_each * 3),
    )
    while True:
        yield draw_fitting(prompt, size=size, most_tokens=most, step=step, task="needle in a haystack")


def _singular(text: str) -> str:
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, singular)
    return text


@cache
def _essay_words() -> list[str]:
    """Return the words of a long public text, which stands for the essays that NVIDIA downloads."""
    text, _ = public_text()
    return text.split()


def _sentences(size: int) -> Sequence[str]:
    """Return the first `size` words of the text, repeated as needed, as sentences."""
    words = _essay_words()
    words = (words * -(-size // len(words)))[:size]
    return re.split(r"(?<=[.!?]) ", " ".join(words))


def _among_sentences(needles: list[str], sentences: Sequence[str], rng: random.Random) -> str:
    """Insert needles between sentences, in order, at depths drawn from 40 evenly spaced ones."""
    places = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(_DEPTHS, len(needles)))
    parts: list[str] = []
    for start, stop, needle in zip([0, *places], places, needles, strict=False):
        parts += [" ".join(sentences[start:stop]), needle]
    parts.append(" ".join(sentences[places[-1] :]))
    return " ".join(parts)
