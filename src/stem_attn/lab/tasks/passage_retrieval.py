"""Passage retrieval: the number of the passage that an excerpt is from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks.passages import fitting, numbered, passages
from stem_attn.lab.tasks.samples import Request, Sample, too_short

NEW_TOKENS = 16
_EXCERPT_WORDS = 24
# LongBench's wording, with an excerpt for its abstract: nobody has written abstracts of these passages.
_QUESTION = (
    "Here are {count} paragraphs, along with an excerpt from one of them. Please determine which paragraph the excerpt "
    "is from.\n\n{context}\n\nThe following is an excerpt.\n\n{excerpt}\n\nPlease enter the number of the paragraph "
    'that the excerpt is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.'
)
_ANSWER_PREFIX = "\n\nThe answer is: Paragraph"


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The length is too short for the task, or needs more passages than there are.
    """
    rng, pool, count_tokens = random.Random(request.seed), passages(), cache(request.count_tokens)

    def prompt(shown: list[str]) -> Sample:
        number, excerpt = _excerpt(shown, rng)
        question = _QUESTION.format(count=len(shown), context=numbered(shown), excerpt=excerpt)
        return request.sample(request.frame.wrap(question, _ANSWER_PREFIX), [str(number)])

    frame_tokens = prompt(list(pool[:1])).prompt_tokens - count_tokens(pool[0])
    room = request.length - NEW_TOKENS - frame_tokens
    while True:
        shown = fitting(rng.sample(pool, len(pool)), room, count_tokens)
        if len(shown) < 2:
            raise too_short("passage_retrieval", request)
        if len(shown) == len(pool):
            raise InputError(f"passage_retrieval has {len(pool)} passages, which do not fill {request.length} tokens")
        yield prompt(shown)


def _excerpt(shown: list[str], rng: random.Random) -> tuple[int, str]:
    """Draw a passage's number and a stretch of it that is in no other and neither begins nor ends it."""
    while True:
        number = rng.randrange(len(shown))
        words = shown[number].split()
        first = rng.randrange(1, len(words) - _EXCERPT_WORDS)
        excerpt = " ".join(words[first : first + _EXCERPT_WORDS])
        if sum(excerpt in passage for passage in shown) == 1:
            return number + 1, excerpt
