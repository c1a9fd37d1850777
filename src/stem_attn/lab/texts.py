"""Independent long prompts from real documents that installed packages bring: prose, code and reference pages."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_attn.lab.errors import InputError
from stem_attn.lab.inputs import read_text
from stem_attn.lab.prompts import public_text

_LEAST_MODULE_BYTES = 30_000
_LEAST_DOCSTRING_CHARACTERS = 400
_CHARACTERS_A_TOKEN = 16  # more than texts have on average; what lies beyond is not encoded


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A stretch of a document, in tokens.

    Args:
        ids: int64 [1, T]; what the tokenizer puts in front of every text, then the excerpt.
        source: The document's name.
        first_character: Where the excerpt starts in the document.
        characters: Its length.
        sha256: Of the excerpt's UTF-8 text.
    """

    ids: Tensor
    source: str
    first_character: int
    characters: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """Return everything but the ids as plain values."""
        return {
            "tokens": self.ids.shape[1],
            "source": self.source,
            "first_character": self.first_character,
            "characters": self.characters,
            "sha256": self.sha256,
        }


def excerpts(tokenizer: Any, tokens: int, count: int, files: Sequence[Path] = ()) -> list[Excerpt]:
    """Cut prompts out of documents: one of each, then further ones, none overlapping another.

    Args:
        tokenizer: Of the model.
        tokens: Length of every prompt.
        count: Prompts wanted.
        files: Documents to use instead of those that are always there.

    Raises:
        InputError: A file cannot be read, or the documents are too short.
    """
    documents = [read_text(file) for file in files] or [document() for document in DOCUMENTS]
    start = list(tokenizer("").input_ids)[:1]  # the token that opens every text, where the model has one
    per_document = [_cut(tokenizer, text, source, start, tokens, count) for text, source in documents]
    in_turn = [cuts[i] for i in range(count) for cuts in per_document if i < len(cuts)]
    if len(in_turn) < count:
        raise InputError(
            f"the documents hold {len(in_turn)} prompts of {tokens} tokens, and {count} are asked for: "
            f"take fewer --prompts, a smaller --length or longer texts"
        )
    return in_turn[:count]


def _cut(tokenizer: Any, text: str, source: str, start: list[int], tokens: int, most: int) -> list[Excerpt]:
    """Return up to `most` excerpts from the document's beginning on."""
    body = tokens - len(start)
    encoded = tokenizer(
        text[: most * tokens * _CHARACTERS_A_TOKEN], add_special_tokens=False, return_offsets_mapping=True
    )
    found = []
    for first in range(0, min(most * body, len(encoded.input_ids) - body + 1), body):
        last = first + body
        begin, end = encoded.offset_mapping[first][0], encoded.offset_mapping[last - 1][1]
        digest = hashlib.sha256(text[begin:end].encode()).hexdigest()
        ids = torch.tensor([start + encoded.input_ids[first:last]])
        found.append(Excerpt(ids, source, begin, end - begin, digest))
    return found


def _standard_library() -> tuple[str, str]:
    """Return the source of the standard library's larger modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(folder.glob("*.py")) if file.stat().st_size >= _LEAST_MODULE_BYTES]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    return text, f"the source of Python {platform.python_version()}'s standard library ({len(files)} modules)"


def torch_pages() -> tuple[str, str]:
    """Return the longer docstrings of PyTorch's public functions and classes, in the order of their names."""
    pages = {}
    for module in (torch, torch.nn, torch.nn.functional, torch.optim, torch.distributions):
        for name in sorted(vars(module)):
            page = getattr(vars(module)[name], "__doc__", None)
            if name.startswith("_") or not isinstance(page, str) or "Args:" not in page:
                continue
            if len(page) >= _LEAST_DOCSTRING_CHARACTERS:
                pages[inspect.cleandoc(page)] = f"{module.__name__}.{name}"  # aliases share a page
    text = "\n\n".join(f"{name}\n\n{page}" for page, name in pages.items())
    return text, f"the reference pages of PyTorch {torch.__version__} ({len(pages)} docstrings)"


DOCUMENTS: tuple[Callable[[], tuple[str, str]], ...] = (public_text, _standard_library, torch_pages)
"""Each returns a text and its name."""
