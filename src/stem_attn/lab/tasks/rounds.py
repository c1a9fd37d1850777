"""Several rounds of coreference: the text that an assistant wrote the n-th time it was asked for the same thing.

Source: Vodrahalli et al., "Michelangelo", https://arxiv.org/abs/2409.12640, the task MRCR. There the texts are a
model's; here they are random words, so that nothing has to be downloaded and no text is like another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from stem_attn.lab.tasks.ruler.words import adjectives, nouns, verbs
from stem_attn.lab.tasks.samples import Request, Sample, draw_fitting, largest_size

NEW_TOKENS = 80
_ASKED_TIMES = 4
_PHRASES = 3
_STEP = 2
_ESTIMATE_ROUNDS = 64
_KINDS = ("poem", "riddle", "song", "speech", "letter", "advertisement", "fairy tale", "prayer")
_ORDINALS = ("first", "second", "third", "fourth")
_QUESTION = (
    "The following is a conversation between a user and an assistant.\n\n{context}\n\nWhat did the assistant write "
    "when the user asked for a {kind} about {topic} for the {ordinal} time? Repeat that text word for word and write "
    "nothing else."
)
_ANSWER_PREFIX = "\nAssistant:"


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The task does not fit the length.
    """
    rng = random.Random(request.seed)
    words = {"adjective": sorted(set(adjectives())), "noun": sorted(set(nouns())), "verb": sorted(set(verbs()))}

    def draw(part: str) -> str:
        return rng.choice(words[part])

    def text() -> str:
        phrases = (
            f"{draw('adjective')} {draw('noun')} {draw('verb')} {draw('adjective')} {draw('noun')}"
            for _ in range(_PHRASES)
        )
        return ", ".join(phrases) + "."

    def prompt(size: int) -> Sample:
        wanted = (rng.choice(_KINDS), draw("noun"))
        others: list[tuple[str, str]] = []
        while len(others) < size:
            # A third are other kinds of text about the same topic.
            other = (rng.choice(_KINDS), wanted[1] if rng.random() < 1 / 3 else draw("noun"))
            if other != wanted:
                others.append(other)
        asked = [*others, *[wanted] * _ASKED_TIMES]
        rng.shuffle(asked)
        rounds = [(kind, topic, text()) for kind, topic in asked]
        context = "\n".join(f"User: Write a {kind} about {topic}.\nAssistant: {text}" for kind, topic, text in rounds)
        which = rng.randrange(_ASKED_TIMES)
        answer = [text for kind, topic, text in rounds if (kind, topic) == wanted][which]
        question = _QUESTION.format(context=context, kind=wanted[0], topic=wanted[1], ordinal=_ORDINALS[which])
        return request.sample(request.frame.wrap(question, _ANSWER_PREFIX), [answer])

    most = request.length - NEW_TOKENS
    tokens_each = prompt(_ESTIMATE_ROUNDS).prompt_tokens / _ESTIMATE_ROUNDS
    size = largest_size(
        lambda n: prompt(n).prompt_tokens, most_tokens=most, step=_STEP, upper=int(request.length / tokens_each * 2)
    )
    while True:
        yield draw_fitting(prompt, size=size, most_tokens=most, step=_STEP, task="rounds")
