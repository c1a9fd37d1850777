"""What ran slower than it might have, and why: logged once, counted always."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import torch
from torch import Tensor

log = logging.getLogger("stem_attn")
_counts: Counter[str] = Counter()
_on_devices: dict[tuple[str, torch.device], Tensor] = {}
_lock = threading.Lock()


def counts() -> dict[str, int]:
    """Return how often each reason was noted. Where devices have counted, this waits for them."""
    with _lock:
        total, late = Counter(_counts), list(_on_devices.items())
    for (reason, _), count in late:
        total[reason] += int(count)
    return {reason: count for reason, count in total.items() if count}


def note_on_device(reason: str, count: Tensor) -> None:
    """Count what only a device knows, without waiting for it, and without a log.

    A captured graph adds at every replay, to what was there before it was captured. The first count of all is left out
    if it is captured: the graph would begin anew each time.

    Args:
        reason: As in `note`.
        count: One int.
    """
    key = reason, count.device
    with _lock:
        if key not in _on_devices:
            if count.is_cuda and torch.cuda.is_current_stream_capturing():
                return
            with torch.inference_mode(False):  # so that it can be added to in any mode
                _on_devices[key] = torch.zeros((), dtype=torch.int64, device=count.device)
        _on_devices[key] += count


def settle() -> None:
    """Take over what devices have counted so far, and leave no tensor behind: its memory may be about to go.

    Not after a graph that counts was captured: it would add to memory that is another's by then.
    """
    with _lock:
        for (reason, _), count in _on_devices.items():
            _counts[reason] += int(count)
        _on_devices.clear()


def note(what: str, reason: str) -> None:
    """Count a reason, and log it the first time.

    Args:
        what: What happens instead.
        reason: Why; begins with the name of the backend that could be faster.
    """
    with _lock:
        new = reason not in _counts
        _counts[reason] += 1
    if new:
        log.warning("%s (%s)", what, reason)
