"""Progress of what takes minutes: a bar in a terminal, and elsewhere, as in a log, a line every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

OnStep = Callable[[str], None]
"""Told what starts."""

LINE_SECONDS = 30.0


class Progress:
    """Count the steps of a piece of work.

    Args:
        name: Of the work.
        unit: What its steps are, in the plural.
        total: How many there are.
        at_most: Whether there may be fewer.
        now: Seconds of a clock that never goes back.
    """

    def __init__(
        self, name: str, unit: str, total: int, *, at_most: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done, self.step = total, 0, ""
        self.on_change: Callable[[], None] | None = None
        self._name, self._unit, self._at_most, self._now = name, unit, at_most, now
        self._running = False
        self._start = now()

    @property
    def title(self) -> str:
        """The work and the step that was named last."""
        return f"{self._name}, {self.step}" if self.step else self._name

    def starts(self, step: str) -> None:
        """Tell what starts; the step before is done."""
        self._set(step, self.done + self._running)
        self._running = True

    def finishes(self, step: str) -> None:
        """Tell what is done."""
        self._set(step, self.done + 1)

    def line(self) -> str:
        """Say what is done and what is left."""
        gone = self._now() - self._start
        total = f"at most {self.total}" if self._at_most else f"{self.total}"
        text = f"{self.title}: {self.done} of {total} {self._unit} done in {_duration(gone)}"
        if not self.done:
            return text
        left = gone / self.done * max(self.total - self.done, 0)
        return f"{text}, about {_duration(left)} left"

    def _set(self, step: str, done: int) -> None:
        self.step, self.done = step, done
        if self.on_change is not None:
            self.on_change()


@contextmanager
def show_progress(name: str, unit: str, total: int, *, at_most: bool = False) -> Iterator[Progress]:
    """Show on stderr how far a piece of work is; see `Progress`.

    Nothing is drawn by the work itself, whose time may be what is measured, but by a thread: once a second in a
    terminal, elsewhere every `LINE_SECONDS`.
    """
    progress = Progress(name, unit, total, at_most=at_most)
    console = Console(stderr=True)
    drawn = _bar if sys.stderr.isatty() and not console.is_dumb_terminal else _lines
    with drawn(progress, console):
        yield progress


@contextmanager
def _bar(progress: Progress, console: Console) -> Iterator[None]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with RichProgress(*columns, *times, console=console, transient=True, refresh_per_second=1) as bar:
        task = bar.add_task(progress.title, total=progress.total)
        progress.on_change = lambda: bar.update(task, description=progress.title, completed=progress.done)
        yield


@contextmanager
def _lines(progress: Progress, console: Console) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=write_lines, args=(progress, over.wait), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def write_lines(progress: Progress, wait: Callable[[float], bool]) -> None:
    """Write a line every `LINE_SECONDS` until the work is over.

    Args:
        progress: The work.
        wait: Wait for so many seconds, or until the work is over; tell whether it is.
    """
    while not wait(LINE_SECONDS):
        try:
            print(progress.line(), file=sys.stderr, flush=True)
        except OSError:  # nobody reads on: the work goes on without
            return


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
