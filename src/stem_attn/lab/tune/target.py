"""What tuned budgets must reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from stem_attn.lab.errors import InputError
from stem_attn.lab.tune.forwards import Outcome

Kind = Literal["kl", "top1", "drift", "agreement"]

_LOSSES = ("kl", "drift")  # in nats; the others are shares to keep


@dataclass(frozen=True, slots=True)
class Target:
    """What the sparse model must reach, mean over prompts.

    Args:
        kind: `"kl"`: KL(dense || sparse) of at most `value` nats, mean over positions; `"top1"`: at least a share
            `value` of positions where both predict the same token; `"drift"`: dense attention's own answer loses at
            most `value` nats of log-probability a token; `"agreement"`: at least a share `value` of answers are
            dense attention's.
        value: The bound.
    """

    kind: Kind
    value: float

    @property
    def asks_answers(self) -> bool:
        """Whether the prompts have to be answered."""
        return self.kind in ("drift", "agreement")

    @property
    def limit(self) -> float:
        """The most damage."""
        return self.value if self.kind in _LOSSES else 1 - self.value

    def met(self, outcome: Outcome) -> bool:
        """Tell whether a run reaches the target."""
        return self.damage(outcome) <= self.limit

    def damage(self, outcome: Outcome) -> float:
        """Return what the target bounds from above: nats, or the share of positions or answers that disagree."""
        if self.kind == "kl":
            return outcome.kl_nats
        if self.kind == "top1":
            return 1 - outcome.top1_agreement
        answers = outcome.answers
        assert answers is not None, "the prompts were not answered"
        return answers.drift_nats if self.kind == "drift" else 1 - answers.agreement

    def rank(self, outcome: Outcome) -> tuple[float, float]:
        """Return what tells a better run of one prompt: its damage, and, of equal shares of a few answers, its nats."""
        return self.damage(outcome), self.nats(outcome)

    def nats(self, outcome: Outcome) -> float:
        """Return what tells layers apart: a share of a few answers would not."""
        if self.asks_answers and outcome.answers is not None:
            return max(outcome.answers.drift_nats, 0.0)  # chance may favour a sparse model
        return outcome.kl_nats

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def parse_target(text: str) -> Target:
    """Read `kl=NATS`, `top1=SHARE`, `drift=NATS` or `agreement=SHARE`.

    Raises:
        InputError: It is something else, or out of range.
    """
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        most = math.inf if kind in _LOSSES else 1.0
        if name.strip() == kind and 0 < number <= most and number < math.inf:
            return Target(kind, number)
    raise InputError(
        f"--target takes kl=NATS or drift=NATS above 0, or top1=SHARE or agreement=SHARE from 0 to 1, such as "
        f"kl=0.01; got {text!r}"
    )
