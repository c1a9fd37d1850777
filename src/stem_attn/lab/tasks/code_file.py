"""Code completion in a long file: the next line, after everything before it that fits.

Source: Guo et al., "LongCoder" (the data set LCC), https://arxiv.org/abs/2306.14893, in LongBench's wording.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks.code_sources import NEW_TOKENS, QUESTION, SourceFile, last_lines, source_files
from stem_attn.lab.tasks.samples import Request, Sample, too_short

_LEAST_FILES = 4  # that are long enough; samples of fewer would be too much alike
_LEAST_TOKEN_BYTES = 2  # on average


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: A package's source is missing, the length is too short for the task, or too few files are as long.
    """
    rng, count_tokens = random.Random(request.seed), cache(request.count_tokens)
    room = request.length - NEW_TOKENS - count_tokens(request.frame.wrap(QUESTION.format(context=""), ""))
    if room < 1:
        raise too_short("code_file", request)

    @cache
    def places(file: SourceFile) -> list[int]:
        """Return the lines worth completing that have enough tokens before them."""
        before, found = 0, []
        for number, line in enumerate(file.lines):
            if before >= room and number in file.statements:
                found.append(number)
            before += count_tokens(line)
        return found

    files = [file for file in source_files() if file.bytes > _LEAST_TOKEN_BYTES * room]
    while True:
        if len(files) < _LEAST_FILES:
            raise InputError(
                f"code_file: fewer than {_LEAST_FILES} files of the installed source have {request.length} tokens; use "
                f"shorter --lengths"
            )
        file = rng.choice(files)
        if not places(file):
            files.remove(file)
            continue
        number = rng.choice(places(file))
        context = last_lines(file.lines[:number], room, count_tokens)
        yield request.sample(request.frame.wrap(QUESTION.format(context=context), ""), [file.lines[number].strip()])
