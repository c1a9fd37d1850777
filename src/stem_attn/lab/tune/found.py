"""What a search for budgets found, and the same as plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from stem_attn.config import StemConfig
from stem_attn.lab.configs import plain_settings
from stem_attn.lab.tune.forwards import Outcome
from stem_attn.lab.tune.target import Target
from stem_attn.policy import PrefillPolicy

SCHEDULE: Literal["depth_decay"] = "depth_decay"
Recipe = tuple[float, float] | Literal["depth_decay"]


@dataclass(frozen=True, slots=True)
class Trial:
    """Sparse forwards with one choice of budgets.

    Args:
        stage: `"uniform"`, `"sensitivity"`, `"recipe"` (allocations of equal density) or `"tuned"`.
        scales: By layer, factor on the config's budget.
        prompts: How many prompts, the first ones.
        outcome: What they gave.
    """

    stage: str
    scales: dict[int, float]
    prompts: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Bracket:
    """The two choices between which the target is crossed, of one family of budgets.

    Args:
        fails: The one of most density found that does not reach the target; None: even the least budget reaches it.
        reaches: The one of least density found that does.
    """

    fails: Trial | None
    reaches: Trial

    def density_at(self, target: Target) -> float:
        """Interpolate the density at which the target is just met: both families stop at steps of their own."""
        if self.fails is None:
            return self.reaches.outcome.density
        low, high = self.fails.outcome, self.reaches.outcome
        above, below = target.damage(low), target.damage(high)
        share = (above - target.limit) / (above - below)
        return low.density + share * (high.density - low.density)


@dataclass(frozen=True, slots=True)
class Tuned:
    """The answer, and what it was found by.

    Args:
        config: The method, its budget scaled by the layers' mean.
        policy: With `layer_budgets`.
        outcome: Its own, on the calibration prompts, run as written.
        uniform: The same budget in every layer.
        by_layer: Budgets by layer.
        recipe: Power of the sensitivities, and share of the way from the uniform budget to the allocation; or
            `SCHEDULE`, the policy's `depth_decay`. None where the uniform budget was not bettered.
        sensitivity: By layer, nats of KL or of drift where it alone has the uniform budget, on the first prompt
            (neighbours that were tried together share theirs evenly); empty where even the least budget reaches the
            target.
        errors: By layer, relative attention error |O_s - O| / |O| of the answer, on the dense forward's q, k, v.
        trials: Every choice of budgets that was tried, in order.
    """

    config: StemConfig
    policy: PrefillPolicy
    outcome: Outcome
    uniform: Bracket
    by_layer: Bracket
    recipe: Recipe | None
    sensitivity: dict[int, float]
    errors: dict[int, float]
    trials: list[Trial]

    @property
    def is_dense(self) -> bool:
        """Whether nothing sparse reaches the target."""
        return self.outcome.density == 1


def describe(tuned: Tuned, target: Target) -> dict[str, Any]:
    """Return an answer as plain values: its config, its layers, and every run."""
    return {
        "config": plain_settings(tuned.config, tuned.policy),
        "only_dense": tuned.is_dense,
        "recipe": tuned.recipe,
        "tuned": numbers(tuned.outcome),
        "uniform": numbers(tuned.uniform.reaches.outcome),
        "density_at_target": {
            "tuned": tuned.by_layer.density_at(target),
            "uniform": tuned.uniform.density_at(target),
        },
        "layers": [
            {
                "layer": layer,
                "factor": tuned.policy.layer_budgets[layer],
                "density": tuned.outcome.densities[layer],
                "error": tuned.errors[layer],
                "sensitivity_nats": tuned.sensitivity.get(layer),
            }
            for layer in tuned.outcome.densities
        ],
        "runs": [
            {
                "stage": trial.stage,
                "prompts": trial.prompts,
                **numbers(trial.outcome),
                "scales": list(trial.scales.values()),
            }
            for trial in tuned.trials
        ],
    }


def numbers(outcome: Outcome) -> dict[str, float]:
    """Return an outcome's totals."""
    return {
        "density": outcome.density,
        "kl_nats": outcome.kl_nats,
        "top1_agreement": outcome.top1_agreement,
        **({} if outcome.answers is None else dataclasses.asdict(outcome.answers)),
    }
