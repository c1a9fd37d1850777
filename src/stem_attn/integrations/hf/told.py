"""Prompt lengths that callers tell: they belong to the block of code that tells them, not to the model.

A length holds in the context (`contextvars`) that opened the block, so in its async tasks and in whatever runs in a
copy of it. A thread does not take its starter's context along, and yet `generate` often runs in one (that is how text
is streamed). So while a block is open, `threading.Thread.start` notes on the new thread what its starter was told; it
is put back when the last block closes. Other threads see nothing.

Blocks may close in another context than the one that opened them (a generator that a web server drives), and in any
order. So a length that has ended is marked, and a leftover of it means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PromptLen = int | tuple[int, ...] | None

_THREAD_ATTRIBUTE = "_stem_attn_told"


@dataclass(slots=True, eq=False)
class _Told:
    """What one block tells of one model."""

    key: int
    lens: PromptLen
    ended: bool = False


@dataclass(slots=True, eq=False)
class _Inherited:
    """A length that a thread has from its starter.

    It holds as long as the block is open, and for the thread's first prompt even if that comes later: whether a thread
    gets to run before its starter leaves the block is chance. It ends then, because a worker that was started in the
    block may go on with other prompts.
    """

    told: _Told
    prompts: int = 0
    layer: int = -1

    def holds(self, layer: int, fresh: bool) -> bool:
        """Tell whether the length is that of a call of a layer; `fresh`: the call begins a prompt."""
        if fresh:
            self.prompts += layer <= self.layer or not self.prompts
            self.layer = layer
        return not self.told.ended or self.prompts <= 1


_told: ContextVar[tuple[_Told, ...]] = ContextVar("stem_attn_told", default=())


@contextlib.contextmanager
def telling(key: int, lens: PromptLen) -> Iterator[None]:
    """Tell the prompt's length of the calls of one model, inside a `with` block.

    Args:
        key: The number of the model's state.
        lens: Tokens of the whole prompt.
    """
    told = _Told(key, lens)
    _told.set((*_open_here(), told))
    _note_threads()
    try:
        yield
    finally:
        _stop_noting_threads()
        told.ended = True
        _told.set(_open_here())


def find(key: int, layer: int | None, *, fresh: bool) -> PromptLen:
    """Return the prompt's length as told for a call of a model, or None.

    Args:
        key: The number of the model's state.
        layer: The layer's index.
        fresh: Whether the call begins a prompt: there is nothing before its queries.
    """
    for told in reversed(_told.get()):
        if told.key == key and not told.ended:
            return told.lens
    for inherited in reversed(_inherited()):
        if inherited.told.key == key and inherited.holds(layer or 0, fresh):
            return inherited.told.lens
    return None


def _open_here() -> tuple[_Told, ...]:
    return tuple(told for told in _told.get() if not told.ended)


def _inherited() -> tuple[_Inherited, ...]:
    return getattr(threading.current_thread(), _THREAD_ATTRIBUTE, ())


_lock = threading.Lock()
_open_blocks = 0
_start: Callable[[threading.Thread], None] = threading.Thread.start  # as it was before the first open block
_noting_start = _start


def _note_threads() -> None:
    global _open_blocks, _start, _noting_start
    with _lock:
        _open_blocks += 1
        if _open_blocks == 1:
            _start = threading.Thread.start
            _noting_start = _noting(_start)
            threading.Thread.start = _noting_start  # type: ignore[method-assign, assignment]


def _stop_noting_threads() -> None:
    global _open_blocks
    with _lock:
        _open_blocks -= 1
        # What somebody else has put in its place in the meantime calls ours, which does nothing without open blocks.
        if not _open_blocks and threading.Thread.start is _noting_start:
            threading.Thread.start = _start  # type: ignore[method-assign, assignment]


def _noting(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    @functools.wraps(start)
    def noting_start(thread: threading.Thread) -> None:
        told = [*(i.told for i in _inherited() if not i.told.ended), *_open_here()]
        if told:
            setattr(thread, _THREAD_ATTRIBUTE, tuple(_Inherited(t) for t in told))
        start(thread)

    return noting_start


def normalize(value: int | Sequence[int] | Tensor | None) -> PromptLen:
    """Check a prompt length: None, an int, or one int a batch row.

    Raises:
        ValueError: It is something else, or a length is below 1.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.tolist()
    lengths: tuple[Any, ...] = (value,) if isinstance(value, int) else ()
    if isinstance(value, Sequence):
        lengths = tuple(value)
    if not lengths or any(type(n) is not int or n < 1 for n in lengths):
        raise ValueError(f"prompt_len must be an int, or one int a batch row, of at least 1 token; got {value!r}")
    return lengths[0] if isinstance(value, int) else lengths


def per_row(lens: PromptLen, batch: int) -> list[int] | None:
    """Return one length a batch row, or None if unknown.

    Raises:
        ValueError: The lengths told are not for this batch size.
    """
    if lens is None:
        return None
    if isinstance(lens, int):
        return [lens] * batch
    # Beam search repeats each row.
    repeats, rest = divmod(batch, len(lens))
    if rest or not repeats:
        raise ValueError(f"prompt_len has {len(lens)} rows, but the batch has {batch}")
    return [n for n in lens for _ in range(repeats)]
