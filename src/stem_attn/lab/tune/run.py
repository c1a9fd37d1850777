"""Choose budgets by layer for a fidelity target at least cost.

1. A dense forward a prompt; as it goes, the attention error of every layer at some budgets.
2. The least budget, the same in every layer, whose sparse forward reaches the target.
3. How much each layer matters: the KL, or the drift where the target is about answers, with this budget in that layer
   alone and all others dense. Of a deep model neighbouring layers are tried together and share what they cost. The
   first prompt is enough for this.
4. A layer's damage at another budget is that, times the ratio of its squared attention errors (the KL of a small
   perturbation is quadratic in it). Budgets that minimise the total damage at a total density are one Lagrange
   multiplier away. Layers are not independent, so this is a direction more than an answer: sparse forwards of the first
   prompt, at equal density, choose how far to trust the layers' weights and how far to go from the uniform budget. The
   policy's own schedule over layers, `depth_decay`, takes part.
5. The density is bisected with sparse forwards of all prompts until the target holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stem_attn.config import StemConfig
from stem_attn.lab.equal_density import mix, share_above
from stem_attn.lab.errors import InputError
from stem_attn.lab.progress import OnStep
from stem_attn.lab.tune.forwards import Outcome, Prompts
from stem_attn.lab.tune.found import SCHEDULE, Bracket, Recipe, Trial, Tuned, numbers
from stem_attn.lab.tune.levels import Level, allocate, follow, interpolate, levels, spread, toward
from stem_attn.lab.tune.recall import ANSWER_TOKENS
from stem_attn.lab.tune.target import Target
from stem_attn.policy import PrefillPolicy

_CURVE_LEVELS = 7  # levels at which attention errors are known; of the last, which keeps everything, without measuring
_MOST_GROUPS = 6  # of layers whose sensitivities are told apart
_BISECTIONS = 6
_CLOSE = 1.04  # densities within this ratio are not bisected further
_TINY = 1e-30
# (power of the layers' sensitivities, share of the way from the uniform budget to the allocation).
_RECIPES = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.5))
_LEAST_SHARE = 0.02  # of the mean: no layer counts for less, however little it seems to matter


def tune(
    model: Any,
    ids: Sequence[Tensor],
    config: StemConfig,
    policy: PrefillPolicy,
    target: Target,
    *,
    logit_stride: int,
    on_step: OnStep,
) -> Tuned:
    """Find budgets by layer that reach a target on some prompts at least density.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T] each, all of one length: the calibration prompts.
        config: The method; its schedule is scaled by layer. Its own `budget_scale` is replaced.
        policy: Its `dense_layers` stay dense; its `layer_budgets` are replaced.
        target: To reach, mean over prompts.
        logit_stride: Compare the predictions of every so many positions.
        on_step: Told what each forward is for.

    Raises:
        InputError: The model has no layer to tune, or the prompts are too short for budgets to differ.
    """
    config, policy = _even(config, policy)
    try:
        policy.check_layers(model.config.get_text_config().num_hidden_layers)
    except ValueError as error:
        raise InputError(str(error)) from error
    steps = levels(config, ids[0].shape[1])
    if len(steps) < 3:
        raise InputError(
            f"at {ids[0].shape[1]} tokens this config has no budgets to choose from: take a longer --length, or "
            f"--set a smaller block_size, budget_floor or dense_below"
        )
    at = spread(len(steps), _CURVE_LEVELS)
    prompts = Prompts(
        model,
        ids,
        config,
        policy,
        logit_stride=logit_stride,
        answer_tokens=ANSWER_TOKENS if target.asks_answers else 0,
        curve=[dataclasses.replace(config, budget_scale=steps[i].scale) for i in at[:-1]],
        on_step=on_step,
    )
    return _Search(prompts, config, policy, steps, target).answer(at)


def most_forwards(config: StemConfig, tokens: int, layers: int, prompts: int, held_out: int) -> int:
    """Return how many forwards `tune` and `check` make at most.

    Args:
        config: The method.
        tokens: Of a prompt.
        layers: Of the model.
        prompts: To tune on.
        held_out: To check on.
    """
    budgets = len(levels(config, tokens))
    uniform = math.ceil(math.log2(max(budgets, 1)))
    on_all = 1 + uniform + 1 + _BISECTIONS + 1  # a dense one first, and the answer as it is written last
    return prompts * on_all + len(neighbours(range(layers))) + len(_RECIPES) + 1 + held_out * (1 + 4)


class _Search:
    def __init__(
        self, prompts: Prompts, config: StemConfig, policy: PrefillPolicy, steps: list[Level], target: Target
    ) -> None:
        self.prompts, self.config, self.policy = prompts, config, policy
        self.steps, self.target = steps, target
        self.layers = prompts.layers
        self.densities = [step.density for step in steps]
        self.trials: list[Trial] = []

    def answer(self, at: list[int]) -> Tuned:
        """Do all of it; `at` are the levels whose attention errors are known."""
        uniform, level = self.least_uniform()
        curves = [interpolate([*self.prompts.errors[layer], 0.0], at, self.densities) for layer in self.layers]
        by_layer, recipe, sensitivity = uniform, None, {}
        if uniform.fails is not None:
            level = min(level, len(self.steps) - 2)  # dense is at no one's expense
            sensitivity = self.sensitivity(level)
            by_layer, recipe = self.by_layer(uniform, curves, list(sensitivity.values()), level)
        config, policy = with_layer_budgets(self.config, self.policy, by_layer.reaches.scales, self.prompts.layer_count)
        written = self.as_written(config, policy, by_layer.reaches)
        scales = [step.scale for step in self.steps]
        errors = {
            layer: float(curve[scales.index(by_layer.reaches.scales[layer])]) ** 0.5
            for layer, curve in zip(self.layers, curves, strict=True)
        }
        return Tuned(config, policy, written, uniform, by_layer, recipe, sensitivity, errors, self.trials)

    def as_written(self, config: StemConfig, policy: PrefillPolicy, found: Trial) -> Outcome:
        """Return what the rounded numbers of an answer give; that of the answer where they keep the same blocks."""
        configs = _by_layer(config, policy, self.layers)
        kept = scaled(self.config, found.scales)
        if all(torch.equal(self.prompts.budget(configs[i]), self.prompts.budget(kept[i])) for i in self.layers):
            return found.outcome
        return self.prompts.run(configs, "as written")

    def least_uniform(self) -> tuple[Bracket, int]:
        """Bisect one level for all layers."""

        def at(level: int) -> Trial:
            return self.attempt("uniform", [level] * len(self.layers))

        low, high = -1, len(self.steps) - 1  # fails, as far as known, and reaches
        dense = dict.fromkeys(self.layers, self.steps[high].scale)
        reaches = Trial("uniform", dense, self.prompts.count, self.prompts.keeping_everything())
        self.trials.append(reaches)
        fails = None
        while high - low > 1:
            middle = (low + high) // 2
            tried = at(middle)
            if self.target.met(tried.outcome):
                high, reaches = middle, tried
            else:
                low, fails = middle, tried
        return Bracket(fails, reaches), high

    def sensitivity(self, level: int) -> dict[int, float]:
        """Return the nats lost where one layer has a level and all others are dense; of a group, an even share."""
        dense = len(self.steps) - 1
        found: dict[int, float] = {}
        for group in neighbours(self.layers):
            alone = [level if layer in group else dense for layer in self.layers]
            nats = self.target.nats(self.attempt("sensitivity", alone, prompts=1).outcome)
            found |= {layer: nats / len(group) for layer in group}
        return found

    def by_layer(
        self, uniform: Bracket, curves: Sequence[Tensor], sensitivity: Sequence[float], level: int
    ) -> tuple[Bracket, Recipe | None]:
        """Choose a recipe and bisect its density; where no recipe betters the uniform budget, that stays."""
        schedule = [self.policy.layer_config(self.config, i, self.prompts.layer_count) for i in self.layers]
        factors = [config.budget_scale for config in schedule]
        recipes: list[Recipe] = [*_RECIPES] if len(set(factors)) == 1 else [*_RECIPES, SCHEDULE]

        def at(recipe: Recipe, density: float) -> list[int]:
            if recipe == SCHEDULE:
                return follow(factors, density, self.steps)
            power, share = recipe
            chosen = allocate(damage(curves, sensitivity, level, power), self.densities, density)
            return toward(chosen, density, share, self.densities)

        low, high = self.densities[0], uniform.reaches.outcome.density
        tried = {recipe: self.attempt("recipe", at(recipe, high), prompts=1) for recipe in recipes}
        best = min(tried, key=lambda recipe: self.target.rank(tried[recipe].outcome))
        fails, reaches = None, self.attempt("tuned", at(best, high))
        if not self.target.met(reaches.outcome):
            return uniform, None
        for _ in range(_BISECTIONS):
            if high < _CLOSE * low:
                break
            middle = (low * high) ** 0.5
            trial = self.attempt("tuned", at(best, middle))
            if self.target.met(trial.outcome):
                high, reaches = middle, trial
            else:
                low, fails = middle, trial
        if reaches.outcome.density >= uniform.reaches.outcome.density:
            return uniform, None
        return Bracket(fails, reaches), best

    def attempt(self, stage: str, chosen: Sequence[int], prompts: int | None = None) -> Trial:
        """Try a level for every layer on the first prompts, by default on all, or return what that gave before."""
        count = self.prompts.count if prompts is None else prompts
        scales = {layer: self.steps[level].scale for layer, level in zip(self.layers, chosen, strict=True)}
        known = next((trial for trial in self.trials if (trial.scales, trial.prompts) == (scales, count)), None)
        if known is None:
            known = Trial(stage, scales, count, self.prompts.run(scaled(self.config, scales), stage, count))
            self.trials.append(known)
        return known


def neighbours(layers: Sequence[int]) -> list[Sequence[int]]:
    """Cut layers into at most `_MOST_GROUPS` runs of neighbours."""
    size = -(-len(layers) // _MOST_GROUPS)
    return [layers[first : first + size] for first in range(0, len(layers), size)]


def damage(curves: Sequence[Tensor], sensitivity: Sequence[float], level: int, power: float) -> Tensor:
    """Return what every layer's levels cost, float64 [layers, levels]; the unit has no meaning.

    Args:
        curves: Squared attention errors of a layer at every level.
        sensitivity: What each layer costs at one level.
        level: That level.
        power: Of the sensitivities: 1 believes them, 0 takes all layers as equally sensitive there.
    """
    mean = max(sum(sensitivity) / len(sensitivity), _TINY)
    weights = [max(nats / mean, _LEAST_SHARE) ** power for nats in sensitivity]
    return torch.stack(
        [curve / max(float(curve[level]), _TINY) * weight for curve, weight in zip(curves, weights, strict=True)]
    )


def scaled(config: StemConfig, scales: Mapping[int, float]) -> dict[int, StemConfig]:
    """Return the configs of layers whose budgets are scaled."""
    return {layer: dataclasses.replace(config, budget_scale=scale) for layer, scale in scales.items()}


def with_layer_budgets(
    config: StemConfig, policy: PrefillPolicy, scales: Mapping[int, float], layers: int
) -> tuple[StemConfig, PrefillPolicy]:
    """Write scales into a config and a policy: their mean as `budget_scale`, the rest as `layer_budgets`.

    Args:
        config: Its own `budget_scale` is replaced.
        policy: Its own `layer_budgets` are replaced.
        scales: By layer; layers without one get the mean.
        layers: Of the model.
    """
    mean = round(sum(scales.values()) / len(scales), 4)
    factors = tuple(round(scales.get(layer, mean) / mean, 4) for layer in range(layers))
    return dataclasses.replace(config, budget_scale=mean), dataclasses.replace(policy, layer_budgets=factors)


def check(model: Any, ids: Sequence[Tensor], tuned: Tuned, *, logit_stride: int, on_step: OnStep) -> dict[str, Any]:
    """Try an answer on other prompts, beside the same budget in every layer, at its own density and at equal density.

    Args:
        model: The model that it was tuned for.
        ids: int64 [1, T] each, all of one length, that of the calibration prompts.
        tuned: The answer.
        logit_stride: Compare the predictions of every so many positions.
        on_step: Told what each forward is for.
    """
    config, policy = _even(tuned.config, tuned.policy)
    tokens = 0 if tuned.outcome.answers is None else ANSWER_TOKENS
    prompts = Prompts(
        model, ids, config, policy, logit_stride=logit_stride, answer_tokens=tokens, curve=[], on_step=on_step
    )
    own = prompts.run(_by_layer(tuned.config, tuned.policy, prompts.layers), "held out, tuned")

    @cache
    def at(scale: float) -> Outcome:
        """Return what the same budget in every layer gives."""
        return prompts.run(scaled(config, dict.fromkeys(prompts.layers, scale)), "held out, uniform")

    uniform = at(next(iter(tuned.uniform.reaches.scales.values())))
    steps = levels(config, ids[0].shape[1])
    above = next((i for i, step in enumerate(steps) if step.density >= own.density), len(steps) - 1)
    low, high = at(steps[max(above - 1, 0)].scale), at(steps[above].scale)
    weight = share_above(low.density, high.density, own.density)
    below, over = numbers(low), numbers(high)
    equal = {name: mix(below[name], over[name], weight) for name in below if name != "density"}
    return {
        "tuned": numbers(own),
        "uniform": numbers(uniform),
        "uniform_at_equal_density": {"density": own.density, **equal},
    }


def _even(config: StemConfig, policy: PrefillPolicy) -> tuple[StemConfig, PrefillPolicy]:
    """Return the method and the policy with the same budget in every layer, as the schedule says."""
    return dataclasses.replace(config, budget_scale=1.0), dataclasses.replace(policy, layer_budgets=())


def _by_layer(config: StemConfig, policy: PrefillPolicy, layers: Sequence[int]) -> dict[int, StemConfig]:
    return {layer: policy.layer_config(config, layer, len(policy.layer_budgets)) for layer in layers}
