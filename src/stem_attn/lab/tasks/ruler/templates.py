"""The wording of RULER's prompts. It is the benchmark's interface, so it stands here word for word.

Source: NVIDIA/RULER (Apache-2.0, Copyright (c) 2024, NVIDIA CORPORATION), commit c3f5e3b,
scripts/data/synthetic/constants.py, and niah.py and variable_tracking.py beside it for needles and noise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wording:
    """One kind of task.

    Args:
        question: What the user says, with `{fields}`.
        answer_prefix: What the model's answer begins with, given to it.
        new_tokens: Most tokens of an answer.
    """

    question: str
    answer_prefix: str
    new_tokens: int


NIAH = Wording(
    question="Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    answer_prefix=" The special magic {type_needle_v} for {query} mentioned in the provided text are",
    new_tokens=128,
)
VARIABLE_TRACKING = Wording(
    question="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    answer_prefix=" Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
    "assigned the value {query}, they are: ",
    new_tokens=30,
)
COMMON_WORDS = Wording(
    question="Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
    "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
    new_tokens=120,
)
FREQUENT_WORDS = Wording(
    question="Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots "
    "'....'. What are the three most frequently appeared words in the above coded text?",
    answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    new_tokens=50,
)

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
