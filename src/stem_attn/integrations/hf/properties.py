"""What models ask of attention that SDPA does not know: a softcap, and a sink of every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

NEED_EAGER = frozenset(("softcap", "s_aux", "sinks"))
"""Arguments without which SDPA would compute something else: it refuses or ignores them."""


@dataclass(frozen=True, slots=True)
class Properties:
    """A softcap and sinks as the public functions take them.

    Args:
        softcap: What the logits' magnitude stays below, or None.
        sinks: [Hq], or None.
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def any(self) -> bool:
        """Whether there are some, so that dense attention is the model's own eager function."""
        return self.softcap is not None or self.sinks is not None


def properties_of(query: Tensor, kwargs: dict[str, Any]) -> tuple[Properties, str | None]:
    """Read a softcap and sinks from what a model passes.

    Args:
        query: [B, Hq, L, D].
        kwargs: The call's further arguments.

    Returns:
        The properties, and why these are not all that is asked for: sinks of another form, say one for every query.
    """
    softcap = kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    if softcap is not None and not isinstance(softcap, int | float):
        return Properties(), "softcap"
    if kwargs.get("sinks") is not None or (sinks is not None and sinks.shape != query.shape[1:2]):
        return Properties(), "attention sinks"
    return Properties(softcap, sinks), None
