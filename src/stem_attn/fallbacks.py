"""What ran slower than it might have, and why: logged once, counted always."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger("stem_attn")
_counts: Counter[str] = Counter()


def counts() -> dict[str, int]:
    """Return how often each reason was noted."""
    return dict(_counts)


def note(what: str, reason: str) -> None:
    """Count a reason, and log it the first time.

    Args:
        what: What happens instead.
        reason: Why; begins with the name of the backend that could be faster.
    """
    if reason not in _counts:
        log.warning("%s (%s)", what, reason)
    _counts[reason] += 1
