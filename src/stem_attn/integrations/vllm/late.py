"""Sums on a GPU, read without waiting for it, and so some steps late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Late:
    """Read a device's sums, whose first dimension may grow."""

    def __init__(self) -> None:
        self._copy: tuple[Tensor, int, Any] | None = None  # sums on the host once the event is over, and their count
        self._given: tuple[Tensor | None, int] = None, 0

    def read(self, sums: Tensor, count: int) -> tuple[Tensor, int] | None:
        """Return what has arrived since the last time, as sums on the host and a count; None: nothing.

        Args:
            sums: The sums so far, [n, ...] on a GPU.
            count: What the host counts beside them, which grows whenever they do.
        """
        new = None
        given, given_count = self._given
        if self._copy is not None:
            there, of, event = self._copy
            if not event.query():
                return None
            grown = there.clone()
            if given is not None:
                grown[: len(given)] -= given
            new = grown, of - given_count
            self._given = there, of
        self._copy = None if count == self._given[1] else _to_host(sums, count)
        return new


def _to_host(sums: Tensor, count: int) -> tuple[Tensor, int, Any]:
    """Begin to copy sums to the host, and return with what is over when they are there."""
    there = torch.empty(sums.shape, device="cpu", dtype=sums.dtype, pin_memory=True)
    there.copy_(sums, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return there, count, event
