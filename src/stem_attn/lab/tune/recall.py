"""Prompts that ask for something: they end with the beginning of a passage that stands further up."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from stem_attn.lab.errors import InputError

PASSAGE_TOKENS = 24  # what a prompt repeats
ANSWER_TOKENS = 32  # how much of the rest dense attention writes
_UPPER_SHARE = 0.75  # of the prompt: passages begin there, out of the last rows' sight


def ask_for_the_rest(ids: Tensor, seed: int) -> Tensor:
    """Let a prompt end with the beginning of one of its passages, so that a model goes on with the passage's rest.

    That can be asked of any model and text, and the answer lies in a few blocks far from the end.

    Args:
        ids: int64 [1, T].
        seed: Of the passage's place.

    Returns:
        int64 [1, T].

    Raises:
        InputError: The prompt has no room for passage, answer and repetition.
    """
    tokens = ids.shape[1]
    places = int(_UPPER_SHARE * (tokens - 2 * PASSAGE_TOKENS - ANSWER_TOKENS))
    if places < 1:
        raise InputError(f"--length {tokens} is too short for prompts that ask for a passage: take longer ones")
    first = random.Random(seed).randrange(places)
    return torch.cat([ids[:, :-PASSAGE_TOKENS], ids[:, first : first + PASSAGE_TOKENS]], 1)
