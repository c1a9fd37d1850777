"""Code completion across files: the first line that uses a name from another file of the package, which is shown.

Source: Liu et al., "RepoBench", https://arxiv.org/abs/2306.03091 (RepoBench-P), in LongBench's wording.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from stem_attn.lab.tasks.code_sources import NEW_TOKENS, QUESTION, SourceFile, last_lines, source_files
from stem_attn.lab.tasks.samples import Request, Sample, too_short

_OWN_SHARE = 1 / 4  # of a prompt, at most: what comes before the line in its own file
_OTHER_SHARE = 1 / 2  # at most: the file that defines the name
_TRIES = 1000
_LEAST_ROOM = 200  # tokens


@dataclass(frozen=True, slots=True)
class _Target:
    """A line to complete.

    Args:
        file: Where it is.
        line: Its number, from 0.
        defined_in: The file that defines the name which the line is the first to use.
        imported: All files that its file imports functions and classes from.
    """

    file: SourceFile
    line: int
    defined_in: SourceFile
    imported: tuple[SourceFile, ...]


def samples(request: Request) -> Iterator[Sample]:
    """Yield the samples of the task, without end.

    Raises:
        InputError: A package's source is missing, or the length is too short for the task.
    """
    rng, count_tokens = random.Random(request.seed), cache(request.count_tokens)
    room = request.length - NEW_TOKENS - count_tokens(request.frame.wrap(QUESTION.format(context=""), ""))
    if room < _LEAST_ROOM:
        raise too_short("code_repo", request)
    files = {file.path: file for file in source_files()}
    paths, targets = list(files), cache(lambda path: _targets(files[path], files))

    def shown(file: SourceFile) -> str:
        return f"# Path: {file.path}\n{file.text}\n"

    def draw() -> tuple[_Target, str]:
        """Return a target, and what is shown of its own file."""
        for _ in range(_TRIES):
            if not (possible := targets(rng.choice(paths))):
                continue
            target = rng.choice(possible)
            own = f"# Path: {target.file.path}\n" + "".join(target.file.lines[: target.line])
            if count_tokens(own) <= _OWN_SHARE * room and count_tokens(shown(target.defined_in)) <= _OTHER_SHARE * room:
                return target, own
        raise too_short("code_repo", request)

    while True:
        target, own = draw()
        left = room - count_tokens(own) - count_tokens(shown(target.defined_in))
        chosen = [shown(target.defined_in)]
        for file in _others(target, list(files.values()), rng):
            text = shown(file)
            if count_tokens(text) > left:
                chosen.append(last_lines(text.splitlines(keepends=True), left, count_tokens))
                break
            chosen.append(text)
            left -= count_tokens(text)
        rng.shuffle(chosen)
        prompt = request.frame.wrap(QUESTION.format(context="".join(chosen) + own), "")
        yield request.sample(prompt, [target.file.lines[target.line].strip()])


def _others(target: _Target, files: list[SourceFile], rng: random.Random) -> list[SourceFile]:
    """Return further files of the package: imported ones first, then those of the same folder, then all."""
    package, folder = target.file.path.partition("/")[0], target.file.path.rpartition("/")[0]
    groups: list[list[SourceFile]] = [
        list(target.imported),
        [file for file in files if file.path.rpartition("/")[0] == folder],
        [file for file in files if file.path.startswith(f"{package}/")],
    ]
    for group in groups:
        rng.shuffle(group)
    given = {target.file: None, target.defined_in: None}
    return [file for file in dict.fromkeys(file for group in groups for file in group) if file not in given]


def _targets(file: SourceFile, files: dict[str, SourceFile]) -> list[_Target]:
    """Return the lines of a file that are the first to use a function or class of another file."""
    tree = file.tree()
    origins = {
        alias.asname or alias.name: origin
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (origin := _module(node, file, files)) is not None
        for alias in node.names
        if alias.name in origin.defines
    }
    first_use: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in origins:
            first_use[node.id] = min(node.lineno - 1, first_use.get(node.id, node.lineno - 1))
    imported = tuple(dict.fromkeys(origins.values()))
    return [
        _Target(file, line, origins[name], imported)
        for name, line in sorted(first_use.items())
        if line in file.statements
    ]


def _module(node: ast.ImportFrom, file: SourceFile, files: dict[str, SourceFile]) -> SourceFile | None:
    """Return the file that `from ... import` names, if it is another one of the same installation."""
    parts = (node.module or "").split(".") if node.module else []
    if node.level:
        parts = file.path.split("/")[: -node.level] + parts
    path = "/".join(parts)
    found = files.get(f"{path}.py") or files.get(f"{path}/__init__.py")
    return None if found is file else found
