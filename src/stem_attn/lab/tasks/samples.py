"""What every task's generator is given and makes, and how it fits a prompt into a length as NVIDIA's does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from stem_attn.lab.errors import InputError

_TRIES = 100  # at the smallest size, before a length is given up; NVIDIA's generator tries for ever


@dataclass(frozen=True, slots=True)
class Frame:
    """What the model's chat format puts around a user's words; nothing for base models.

    Args:
        before: What precedes them.
        after: What follows them, up to where the answer begins.
    """

    before: str = ""
    after: str = ""

    def wrap(self, question: str, answer_prefix: str) -> str:
        """Return a whole prompt."""
        return self.before + question + self.after + answer_prefix


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and what a right answer contains.

    Args:
        prompt: Chat format and the answer's beginning included.
        references: The strings to be found.
        prompt_tokens: Of the prompt, special tokens that the tokenizer adds not counted.
    """

    prompt: str
    references: tuple[str, ...]
    prompt_tokens: int

    @property
    def sha256(self) -> str:
        """Of the prompt's UTF-8 text."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Request:
    """What to make samples for.

    Args:
        length: Most tokens of prompt and answer together.
        seed: Of everything random.
        frame: The model's chat format.
        count_tokens: Returns the tokens of a text, without special tokens.
    """

    length: int
    seed: int
    frame: Frame
    count_tokens: Callable[[str], int]

    def sample(self, prompt: str, references: list[str]) -> Sample:
        """Return a sample with its tokens counted."""
        return Sample(prompt, tuple(references), self.count_tokens(prompt))


def largest_size(tokens: Callable[[int], int], *, most_tokens: int, step: int, upper: int) -> int:
    """Search the largest size of a prompt that fits, by bisection over single random draws.

    The draws differ from the prompts used later, as in NVIDIA's generator; `draw_fitting` makes up for bad luck.

    Args:
        tokens: Draws a prompt of a size and returns its tokens.
        most_tokens: That a prompt may have.
        step: The smallest size, which is returned if none fits.
        upper: The largest size to try, unless twice the smallest is more.
    """
    low, high, best = step, max(upper, 2 * step), step
    while low <= high:
        middle = (low + high) // 2
        if tokens(middle) <= most_tokens:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def draw_fitting(draw: Callable[[int], Sample], *, size: int, most_tokens: int, step: int, task: str) -> Sample:
    """Draw prompts, each a step smaller than the last, until one fits.

    Raises:
        InputError: None of the smallest size fits.
    """
    tries = _TRIES
    while tries:
        sample = draw(size)
        if sample.prompt_tokens <= most_tokens:
            return sample
        if size > step:
            size -= step
        else:
            tries -= 1
    raise InputError(
        f"{task} does not fit: its smallest prompt has about {sample.prompt_tokens} tokens, and the length leaves "
        f"{most_tokens} beside the answer; use longer --lengths"
    )


def too_short(task: str, request: Request) -> InputError:
    """Return the error of a length that leaves no room for a task."""
    return InputError(f"{task} does not fit {request.length} tokens; use longer --lengths")
