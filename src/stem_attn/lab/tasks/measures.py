"""How near an answer is to its reference, in percent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher


def edit_similarity(answer: str, references: Sequence[str]) -> float:
    """Compare an answer's line of code with the line that was left out, character by character.

    Source: LongBench's `code_sim_score`, with the ratio of `difflib`, which its `fuzzywuzzy` computes too.
    """
    return 100 * SequenceMatcher(None, code_line(answer), references[0].strip(), autojunk=False).ratio()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Tell whether an answer's line of code is the line that was left out, white space around it aside."""
    return 100.0 * (code_line(answer) == references[0].strip())


def code_line(answer: str) -> str:
    """Return an answer's first line that is neither a comment nor the fence of a code block, stripped."""
    lines = [line for line in answer.strip().split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    return lines[0].strip() if lines else answer.strip()


def number_match(answer: str, references: Sequence[str]) -> float:
    """Return the share of the numbers in an answer that are the wanted one.

    Source: LongBench's `retrieval_score` and `count_score`.
    """
    numbers = re.findall(r"\d+", answer)
    return 100 * numbers.count(references[0]) / len(numbers) if numbers else 0.0


def word_similarity(answer: str, references: Sequence[str]) -> float:
    """Compare an answer with a text, word by word; what follows the text's length is not read.

    Words and not characters, since texts of other words share most of their characters' order.
    """
    wanted = references[0].split()
    return 100 * SequenceMatcher(None, answer.split()[: len(wanted)], wanted, autojunk=False).ratio()
