"""Python source that every installation has: what code completion is made of."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import io
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from stem_attn.lab.errors import InputError

# Packages that an evaluation needs anyway, and their licences.
PACKAGES = {"torch": "BSD-3-Clause", "transformers": "Apache-2.0", "numpy": "BSD-3-Clause"}

# LongBench's.
NEW_TOKENS = 64
QUESTION = "Please complete the code given below. \n{context}Next line of code:\n"

_LEAST_STATEMENT, _MOST_STATEMENT = 12, 120  # characters
_LAYOUT = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
_NO_CODE = ("import ", "from ", "@", "pass", "else", "try", '"', "'")  # what says nothing, and docstrings


@dataclass(frozen=True)
class SourceFile:
    """One module of a package.

    Args:
        folder: Where packages are installed.
        path: Of the file in it, with forward slashes.
    """

    folder: Path
    path: str

    @property
    def bytes(self) -> int:
        """The file's size."""
        return (self.folder / self.path).stat().st_size

    @cached_property
    def text(self) -> str:
        """The module's source."""
        return (self.folder / self.path).read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        """The module's lines, each with its end."""
        return self.text.splitlines(keepends=True)

    @cached_property
    def statements(self) -> frozenset[int]:
        """Numbers, from 0, of the lines that hold a whole statement worth completing."""
        found: list[int] = []
        start, first = None, 0
        for token in self._tokens():
            if start is None and token.type not in _LAYOUT:
                start, first = token.start[0], token.start[1]
            if token.type == tokenize.NEWLINE:
                text = token.line[first:].rstrip()
                if (
                    start == token.start[0]
                    and _LEAST_STATEMENT <= len(text) <= _MOST_STATEMENT
                    and not text.startswith(_NO_CODE)
                    and not any(mark in text for mark in ("#", "`", "//"))  # the measure skips lines with these
                ):
                    found.append(start - 1)
                start = None
        return frozenset(found)

    def _tokens(self) -> Iterator[tokenize.TokenInfo]:
        """Yield the module's tokens, as far as this Python knows its syntax."""
        try:
            yield from tokenize.generate_tokens(io.StringIO(self.text).readline)
        except (SyntaxError, tokenize.TokenError):
            return

    def tree(self) -> ast.Module:
        """Return the module's syntax tree, which is too large to keep; empty if its syntax is newer than Python's."""
        try:
            return ast.parse(self.text)
        except SyntaxError:
            return ast.Module([], [])

    @cached_property
    def defines(self) -> frozenset[str]:
        """Names of the module's own functions and classes."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return frozenset(node.name for node in self.tree().body if isinstance(node, kinds))


@cache
def source_files() -> tuple[SourceFile, ...]:
    """Return the packages' modules, in the order of the packages' names and the files' paths.

    Raises:
        InputError: A package is not installed, or came without its source.
    """
    return tuple(file for package in sorted(PACKAGES) for file in _modules(package))


def sources() -> list[str]:
    """Return the packages' names with their versions and licences."""
    return [f"the source of {name} {importlib.metadata.version(name)}, {PACKAGES[name]}" for name in PACKAGES]


def _modules(package: str) -> list[SourceFile]:
    spec = importlib.util.find_spec(package)
    root = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    paths = sorted(path.relative_to(root.parent).as_posix() for path in root.rglob("*.py")) if root is not None else []
    if root is None or len(paths) < 2:
        raise InputError(
            f"code completion reads the source of {', '.join(PACKAGES)}, and that of {package} is not installed; "
            f"leave the tasks code_file and code_repo out, or install {package} with its .py files"
        )
    return [SourceFile(root.parent, path) for path in paths]


def last_lines(lines: Sequence[str], room: int, count_tokens: Callable[[str], int]) -> str:
    """Return the end of a text that has at most so many tokens and about as many: whole lines, all if they fit.

    Args:
        lines: Of the text, each with its end.
        room: Tokens.
        count_tokens: Of a text; it may be cached, since it is asked for every line.
    """

    def end(most: int) -> int:
        first = len(lines)
        while first > 0 and (most := most - count_tokens(lines[first - 1])) >= 0:
            first -= 1
        return first

    first = end(room)
    alone = sum(map(count_tokens, lines[first:]))
    saved = alone - count_tokens("".join(lines[first:]))  # lines share tokens at their seams
    first = end(room + max(saved, 0))
    while first < len(lines) and count_tokens("".join(lines[first:])) > room:
        first += 1
    return "".join(lines[first:])
