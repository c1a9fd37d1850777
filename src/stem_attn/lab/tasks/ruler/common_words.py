"""Common words extraction (cwe): the ten most frequent of a numbered list of words, after one worked example."""

from __future__ import annotations

import random
from collections.abc import Iterator

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks.ruler.templates import COMMON_WORDS
from stem_attn.lab.tasks.ruler.words import adjectives, nouns, verbs
from stem_attn.lab.tasks.samples import Request, Sample, draw_fitting, largest_size

_COMMON = 10
_STEP = 10
_ESTIMATE_WORDS = 4096


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The length is too short for the task, or needs more words than there are.
    """
    rng = random.Random(request.seed)
    words = sorted({*nouns(), *adjectives(), *verbs()})
    random.Random(request.seed).shuffle(words)
    # Distinct words of the worked example, then how often common and other words occur in it and in the question.
    short = request.length < 4096
    example_words, in_example, in_question = (20, (3, 1), (6, 1)) if short else (40, (10, 3), (30, 3))

    def numbered(count: int, repeats: tuple[int, int]) -> tuple[str, list[str]]:
        if count > len(words):
            raise InputError(f"cwe at {request.length} tokens needs over {len(words)} distinct words; use less")
        drawn = rng.sample(words, count)
        common, others = drawn[:_COMMON], drawn[_COMMON:]
        listed = common * repeats[0] + others * repeats[1]
        random.Random(request.seed).shuffle(listed)
        return _enumerate(listed), common

    def prompt(size: int) -> Sample:
        example, answer = numbered(example_words, in_example)
        context, common = numbered(size, in_question)
        # The worked example is a whole exchange, chat format included.
        shown, asked = (
            request.frame.wrap(COMMON_WORDS.question.format(context=text), COMMON_WORDS.answer_prefix)
            for text in (example, context)
        )
        return request.sample(f"{shown} {_enumerate(answer)}\n{asked}", common)

    most = request.length - COMMON_WORDS.new_tokens
    tokens_each = prompt(_ESTIMATE_WORDS).prompt_tokens / _ESTIMATE_WORDS
    size = largest_size(
        lambda n: prompt(n).prompt_tokens,
        most_tokens=most,
        step=_STEP,
        upper=int(request.length // tokens_each) * 2,
    )
    while True:
        yield draw_fitting(prompt, size=size, most_tokens=most, step=_STEP, task="cwe")


def _enumerate(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
