"""Variable tracking (vt): a chain of assignments hidden in noise, after one worked example."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from stem_attn.lab.tasks.ruler.templates import NOISE, VARIABLE_TRACKING
from stem_attn.lab.tasks.samples import Request, Sample, draw_fitting, largest_size

_VARIABLES = 5
_EXAMPLE_TOKENS = 500
_EXAMPLE_VALUE = "12345"
_EXAMPLE_STEP = 5


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The task does not fit the length.
    """
    rng, numbers = random.Random(request.seed), np.random.RandomState(request.seed)

    def name(letters: int) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=letters))

    def number() -> str:
        return str(numbers.randint(10000, 99999))

    def names(letters: int) -> list[str]:
        while True:
            drawn = [name(letters) for _ in range(_VARIABLES)]
            if len(set(drawn)) == _VARIABLES:
                return drawn

    def ask(size: int, variables: list[str], value: str) -> tuple[str, str]:
        """Return the question and how its answer begins."""
        chain = [f"VAR {variables[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
        lines = [NOISE] * size
        for earlier, place in enumerate(sorted(rng.sample(range(size), _VARIABLES))):
            lines.insert(place + earlier, chain[earlier])
        fields = {
            "context": "\n".join(lines).replace(". \n", ".\n"),
            "query": value,
            "num_v": _VARIABLES,
        }
        return VARIABLE_TRACKING.question.format(**fields), VARIABLE_TRACKING.answer_prefix.format(**fields)

    def worked(size: int) -> Sample:
        variables = names(3)
        return request.sample("".join(ask(size, variables, _EXAMPLE_VALUE)), variables)

    def prompt(size: int, example: str | None) -> Sample:
        variables = names(5)
        question, prefix = ask(size, variables, number())
        if example is not None:
            question = _other_names(example, name, number) + "\n" + question
        return request.sample(request.frame.wrap(question, prefix), variables)

    size = _size(lambda n: worked(n).prompt_tokens, length=_EXAMPLE_TOKENS, taken=0, step=_EXAMPLE_STEP)
    shown = draw_fitting(worked, size=size, most_tokens=_EXAMPLE_TOKENS, step=_EXAMPLE_STEP, task="vt's worked example")
    example = f"{shown.prompt} {' '.join(shown.references)}\n"

    step = 10 if request.length >= 4096 else 5
    taken = request.count_tokens(example) + VARIABLE_TRACKING.new_tokens
    size = _size(lambda n: prompt(n, None).prompt_tokens, length=request.length, taken=taken, step=step)
    most = request.length - VARIABLE_TRACKING.new_tokens
    while True:
        yield draw_fitting(lambda n: prompt(n, example), size=size, most_tokens=most, step=step, task="vt")


def _size(tokens: Callable[[int], int], *, length: int, taken: int, step: int) -> int:
    upper = int(length / (tokens(step) / step) * 3)
    return largest_size(tokens, most_tokens=length - taken, step=step, upper=upper)


def _other_names(example: str, name: Callable[[int], str], number: Callable[[], str]) -> str:
    """Return the worked example with other variables and another value; the answer names all variables."""
    for old in example.split()[-_VARIABLES:]:
        example = example.replace(old, name(len(old)))
    return example.replace(_EXAMPLE_VALUE, number())
