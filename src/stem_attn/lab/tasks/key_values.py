"""Key-value retrieval: the value of one key in a long JSON object of random UUIDs.

Source: Liu et al., "Lost in the Middle", https://arxiv.org/abs/2307.03172, section 3.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator

from stem_attn.lab.tasks.samples import Request, Sample, draw_fitting, largest_size

NEW_TOKENS = 64
_STEP = 2
_QUESTION = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{context}\n\n"
    'Key: "{key}"'
)
_ANSWER_PREFIX = "\nCorresponding value:"


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: The task does not fit the length.
    """
    rng = random.Random(request.seed)
    most = request.length - NEW_TOKENS

    def identifier() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def prompt(size: int) -> Sample:
        pairs = {identifier(): identifier() for _ in range(size)}
        key = rng.choice(list(pairs))
        question = _QUESTION.format(context=json.dumps(pairs, indent=1), key=key)
        return request.sample(request.frame.wrap(question, _ANSWER_PREFIX), [pairs[key]])

    tokens_each = prompt(_STEP).prompt_tokens / _STEP
    size = largest_size(
        lambda n: prompt(n).prompt_tokens, most_tokens=most, step=_STEP, upper=int(request.length / tokens_each * 2)
    )
    while True:
        yield draw_fitting(prompt, size=size, most_tokens=most, step=_STEP, task="key_values")
