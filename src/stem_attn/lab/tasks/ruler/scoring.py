"""RULER's score: the share of the references that the answer contains."""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(answer: str, references: Sequence[str]) -> float:
    """Return the percentage of the references found in an answer as substrings, letter case aside.

    Args:
        answer: What the model wrote after the answer's given beginning.
        references: At least one string.

    Source: `string_match_all` of NVIDIA/RULER.
    """
    found = clean(answer).lower()
    return 100 * sum(reference.lower() in found for reference in references) / len(references)


def clean(answer: str) -> str:
    """Strip an answer, and turn control characters into line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()
