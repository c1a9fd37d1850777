"""Passage counting: how many different passages there are among many, most of which are copies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from stem_attn.lab.tasks.passages import fitting, numbered, passages
from stem_attn.lab.tasks.samples import Request, Sample, too_short

NEW_TOKENS = 8
_MOST_DIFFERENT = 9
# LongBench's wording.
_QUESTION = (
    "There are some paragraphs below. Some of them may be duplicates. Please carefully read these paragraphs and "
    "determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating "
    "paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
    "duplicates. The output format should only contain the number, such as 1, 2, 3, and so on."
)
_ANSWER_PREFIX = "\n\nThe final answer is:"


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The length is too short for the task.
    """
    rng, pool, count_tokens = random.Random(request.seed), passages(), cache(request.count_tokens)

    def prompt(shown: list[str]) -> Sample:
        question = _QUESTION.format(context=numbered(shown))
        return request.sample(request.frame.wrap(question, _ANSWER_PREFIX), [str(len(set(shown)))])

    room = request.length - NEW_TOKENS - prompt([]).prompt_tokens
    while True:
        different = rng.sample(pool, rng.randint(2, _MOST_DIFFERENT))
        copies = rng.choices(different, k=max(room, 0))  # more than fit: a passage has many tokens
        shown = fitting([*different, *copies], room, count_tokens)
        if len(shown) < 2:
            raise too_short("passage_count", request)
        rng.shuffle(shown)
        yield prompt(shown)
