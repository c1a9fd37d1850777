"""Long prompts: the embedded public text with a needle in it, or the user's own text."""

from __future__ import annotations

import dataclasses
import platform
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_attn.lab.errors import InputError

# Room that joining the parts of a prompt may need beyond their own tokens.
_SEAM_TOKENS = 8
# Where needles go. SmolLM2-135M, the default model, misses most of what lies further back in 8K tokens, densely too.
_DEPTHS = (0.4, 0.9)
_CITIES = ("Cairo", "Lima", "Lisbon", "Madrid", "Nairobi", "Oslo", "Vienna", "Warsaw")


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact hidden in a long text, and the question that it answers.

    Args:
        sentence: What is inserted, a paragraph of its own.
        question: What is asked at the end.
        answer: What a right answer contains.
        depth: Where it is inserted, as a share of the text's characters.
    """

    sentence: str
    question: str
    answer: str
    depth: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt and where it comes from.

    Args:
        ids: int64 [1, T].
        source: The text's name, for reports.
        question: What is asked after the text, or None.
        needle: The fact hidden in the text, or None.
        cut: Whether the text was longer than what is used.
    """

    ids: Tensor
    source: str
    question: str | None
    needle: Needle | None
    cut: bool

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.ids.shape[1]

    def describe(self) -> dict[str, Any]:
        """Return everything but the ids as plain values."""
        needle = None if self.needle is None else dataclasses.asdict(self.needle)
        return {
            "tokens": self.tokens,
            "source": self.source,
            "question": self.question,
            "needle": needle,
            "cut": self.cut,
        }


def public_text() -> tuple[str, str]:
    """Return a long public text that every Python has, and its name.

    It is the language reference that `help()` shows, about 460 000 characters.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return text, f"the Python {platform.python_version()} language reference (pydoc_data.topics)"


def make_needle(text: str, seed: int) -> Needle:
    """Return a needle whose city, depth and four-digit number, one that is not in the text, follow from the seed."""
    rng = random.Random(seed)
    city, depth = rng.choice(_CITIES), rng.uniform(*_DEPTHS)
    number = rng.choice([number for number in map(str, range(1000, 10000)) if number not in text])
    return Needle(
        sentence=f"Remember this: the password of the red door in {city} is {number}.",
        question=f"What is the password of the red door in {city}?",
        answer=number,
        depth=depth,
    )


def build_prompt(
    tokenizer: Any,
    text: str,
    *,
    source: str,
    question: str | None = None,
    needle: Needle | None = None,
    max_tokens: int | None = None,
) -> Prompt:
    """Put a text, a needle and a question into the model's chat format.

    Args:
        tokenizer: Of the model; without a chat template the text goes in plain.
        text: The long text.
        source: The text's name.
        question: Asked after the text.
        needle: Inserted between two paragraphs; its question is asked.
        max_tokens: Cut the text's end so that the whole prompt has at most this many tokens.

    Raises:
        InputError: `max_tokens` leaves no room for text.
    """
    if needle is not None:
        question = needle.question
    whole = text
    if max_tokens is not None:
        frame = len(_encode(tokenizer, "", needle, question))
        room = max_tokens - frame - _SEAM_TOKENS
        if room < 1:
            raise InputError(f"--max-tokens {max_tokens} leaves no room for text: the rest of the prompt has {frame}")
        text = _first_tokens(tokenizer, text, room)
    ids = torch.tensor([_encode(tokenizer, text, needle, question)])
    return Prompt(ids, source, question, needle, cut=len(text) < len(whole))


def _encode(tokenizer: Any, text: str, needle: Needle | None, question: str | None) -> list[int]:
    """Return the tokens of the whole prompt."""
    if needle is not None:
        gap = text.find("\n\n", int(needle.depth * len(text)))
        gap = len(text) if gap < 0 else gap
        text = f"{text[:gap]}\n\n{needle.sentence}{text[gap:]}"
    content = text if question is None else f"{text}\n\n{question}"
    plain = tokenizer.chat_template is None
    if plain:
        chat = content + "\n"
    else:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    return list(tokenizer(chat, add_special_tokens=plain).input_ids)


def _first_tokens(tokenizer: Any, text: str, tokens: int) -> str:
    """Return the start of a text that has this many tokens, or the whole text if it has fewer."""
    text = text[: tokens * 64]  # no tokenizer packs more characters into a token on average; saves encoding the rest
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if len(encoded.input_ids) <= tokens:
        return text
    return text[: encoded.offset_mapping[tokens][0]]
