"""A bar for what takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnStep = Callable[[str], None]
"""Told what starts."""


@contextmanager
def named_steps(name: str, unit: str) -> Iterator[OnStep]:
    """Show a bar that names every step as it starts; transformers' own bars are under the same switch."""
    from transformers.utils import logging

    with logging.tqdm(desc=name, unit=unit, leave=False) as bar:

        def on_step(step: str) -> None:
            bar.set_description(f"{name}, {step}")
            bar.update()

        yield on_step
