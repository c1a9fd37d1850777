"""StemConfig: every setting of the method, validated once.

The fields fall in three groups: the block grid, the Output-Aware Metric (which blocks) and Token Position-Decay (how
many blocks). What adapters decide about whole models is `policy.PrefillPolicy`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Score = Literal["linear", "mass"]
ValueTerm = Literal["none", "log", "zscore"]
DecayStart = Literal["first_row", "plateau"]
ForcedBlocks = Literal["inside", "on_top"]
BudgetScope = Literal["head", "group", "layer"]
Residual = Literal["none", "mean"]
Precision = Literal["auto", "fp8"]
RatioSteps = tuple[tuple[int | None, float], ...]
_MOST_BLOCKS = 1 << 30  # numbers that kernels take in 32 bits
_MOST_BUDGET = 1e300  # blocks: no budget is larger, so that none overflows
_MOST_WEIGHT = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class StemConfig:
    """Say how Stem scores, budgets and selects key blocks.

    `n` below is the number of blocks of the whole prompt, `ceil(prompt_len / block_size)`, and a row is one
    query block. All counts are per query block and per head.

    Args:
        block_size: Tokens in a query block and in a key block; a multiple of 16 from 16 to 128.
        score: How a block pair's attention is estimated. `"linear"`: the mean of antidiagonal dot products (paper,
            official code); `"mass"`: the log of the attention mass that the key block takes from the query block,
            estimated between groups of tokens that stand for their mean; of the shares that the query block's groups
            give it, the largest counts.
        stride: With linear scores, tokens between the positions that are paired: smaller is cheaper and coarser. With
            mass scores, tokens of a group of keys, and half of those of a group of queries: larger is cheaper and
            coarser. It divides `block_size`.
        spread_weight: With mass scores, weight of the spread of keys inside their group: a group of unlike keys holds
            more mass than its mean says. 1 is the second-order term of independent, normal dimensions; 0 is off.
        value_term: What a key block's value magnitude adds to its score. `"log"`: the block's largest
            `max(0, log |v|)` (paper, Eq. 7); `"zscore"`: the official code's rectified z-score over the
            sequence, which looks at future tokens; `"none"`: nothing.
        value_weight: Weight of the value term, in natural-log units of attention (beta, lambda).
        budget_ratio: Kept blocks of the first rows as a share of `n`. One number, or steps
            `((below, ratio), ..., (None, ratio))`: the first step with `n < below` applies.
        budget_bias: Blocks added to `ratio * n`.
        budget_scale: Factor on `ratio * n + budget_bias`.
        budget_floor: Blocks that every row keeps at least.
        dense_below: Prompts of fewer blocks than this keep everything.
        decay: The last row keeps this share of what the first row keeps (mu, alpha), in (0, 1]. Token
            Position-Decay is linear in between.
        decay_from: Where the decay starts. `"first_row"`: at row 0 (paper, Eq. 3); `"plateau"`: at the first row
            that has more causal blocks than the budget, from which point a float64 linspace is floored
            (official code).
        tail_blocks: Query blocks at the end of the prompt that keep more. The decay leaves the fewest keys to the rows
            that read the prompt's question and predict its answer.
        tail_ratio: Share of its causal blocks that each of these keeps at least; 1 is everything.
        budget_scope: Whose budgets are one. `"head"`: every query head keeps its own k(i) blocks; `"group"`: the query
            heads of a KV head share the sum of theirs, which goes to the highest scores among them; `"layer"`: all
            heads of the call do (under tensor parallelism those of the rank). The cost is the same.
        head_floor: Share of k(i) that every head keeps whatever the others score, in [0, 1]; for shared budgets.
        sink_blocks: Key blocks at the start of the sequence that are always kept.
        local_blocks: Key blocks up to and including the diagonal one that are always kept; at least 1.
        forced_blocks: Whether sink and local blocks are kept `"inside"` the budget or `"on_top"` of it.
        residual: What stands for pruned blocks: `"none"`, or `"mean"`: each returns as one key and one value, its
            means, rounded to the inputs' dtype, weighted by its number of tokens.
        precision: Of attention's products: `"auto"`, that of the inputs; or `"fp8"`: q, k, v and the weights are
            rounded to 8 bits (e4m3), which needs a Hopper GPU, and is not computed with a residual. Blocks are
            selected as ever.

    Raises:
        ValueError: A field has the wrong type or lies outside its range, or two exclude each other.

    Source: Stem (arXiv 2603.06274), Sections 3.1 (Token Position-Decay) and 3.2 (Output-Aware Metric).
    """

    block_size: int = 128
    score: Score = "mass"
    stride: int = 8
    spread_weight: float = 0.5
    value_term: ValueTerm = "log"
    value_weight: float = 0.2
    budget_ratio: RatioSteps | float = 0.1
    budget_bias: int = 12
    budget_scale: float = 1.0
    budget_floor: int = 1
    dense_below: int = 0
    decay: float = 0.85
    decay_from: DecayStart = "plateau"
    tail_blocks: int = 2
    tail_ratio: float = 1.0
    budget_scope: BudgetScope = "layer"
    head_floor: float = 0.25
    sink_blocks: int = 1
    local_blocks: int = 2
    forced_blocks: ForcedBlocks = "inside"
    residual: Residual = "none"
    precision: Precision = "auto"
    # Ready-made: torch.compile cannot trace json, and every layer of a model asks caches by config.
    _json: str = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget_ratio", _ratio_steps(self.budget_ratio))
        check_int("block_size", self.block_size, 16, 128)
        if self.block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16, got {self.block_size}")
        check_int("stride", self.stride, 1, self.block_size)
        if self.block_size % self.stride:
            raise ValueError(f"stride must divide block_size {self.block_size}, got {self.stride}")
        _check_choice("score", self.score, Score)
        check_float("spread_weight", self.spread_weight, 0.0, _MOST_WEIGHT)
        _check_choice("value_term", self.value_term, ValueTerm)
        check_float("value_weight", self.value_weight, 0.0, _MOST_WEIGHT)
        for name in ("budget_bias", "dense_below", "tail_blocks"):
            check_int(name, getattr(self, name), 0)
        check_int("sink_blocks", self.sink_blocks, 0, _MOST_BLOCKS)
        check_float("budget_scale", self.budget_scale, 0.0, math.inf)
        check_int("budget_floor", self.budget_floor, 1)
        check_int("local_blocks", self.local_blocks, 1, _MOST_BLOCKS)
        check_float("tail_ratio", self.tail_ratio, 0.0, 1.0)
        check_float("decay", self.decay, 0.0, 1.0)
        if self.decay == 0:
            raise ValueError("decay must be above 0, got 0")
        _check_choice("decay_from", self.decay_from, DecayStart)
        _check_choice("budget_scope", self.budget_scope, BudgetScope)
        check_float("head_floor", self.head_floor, 0.0, 1.0)
        _check_choice("forced_blocks", self.forced_blocks, ForcedBlocks)
        _check_choice("residual", self.residual, Residual)
        check_precision(self.precision, self.residual)
        values = {name: getattr(self, name) for name in field_names()}
        object.__setattr__(self, "_json", json.dumps(values))
        object.__setattr__(self, "_hash", hash(tuple(values.values())))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return StemConfig.from_json, (self._json,)  # another process hashes otherwise

    def scaled(self, factor: float) -> StemConfig:
        """Return the config with another budget: `budget_scale` times a factor, at most the largest number."""
        return dataclasses.replace(self, budget_scale=min(self.budget_scale * factor, sys.float_info.max))

    @property
    def query_stride(self) -> int:
        """Tokens of a group of queries, with mass scores: twice `stride`, where that divides a block."""
        return self.stride if self.block_size % (2 * self.stride) else 2 * self.stride

    @property
    def keeps_everything(self) -> bool:
        """Whether every row of every prompt keeps all its blocks."""
        never_falls = self.decay == 1 or self.decay_from == "plateau"  # no row has more than a full budget
        return self.budget_scale >= 1 and never_falls and all(x == 1 for _, x in _ratio_steps(self.budget_ratio))

    def ratio(self, n: int) -> float:
        """Return the step of `budget_ratio` that applies to a prompt of n blocks."""
        return next(ratio for below, ratio in _ratio_steps(self.budget_ratio) if below is None or n < below)

    def full_budget(self, n: int) -> float:
        """Return the blocks from which the budgets of a prompt of n blocks decay, not yet held in any bounds.

        They are `budget_scale * (ratio * n + budget_bias)`, but no more than 1e300.
        """
        unscaled = self.ratio(n) * n + min(self.budget_bias, _MOST_BUDGET)
        return min(self.budget_scale * unscaled, _MOST_BUDGET)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> StemConfig:
        """Return a named configuration, with some fields replaced.

        Args:
            name: `"default"`; `"official"`, the authors' torch code; `"paper"`, the published equations; or
                `"default-0.1"`, what was the default in version 0.1.
            overrides: Fields of `StemConfig` to replace.

        Raises:
            ValueError: The preset or a field is unknown, or a value is out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> StemConfig:
        """Build a config from plain values; unknown names are refused.

        Raises:
            ValueError: A field is unknown, or a value is out of range.
        """
        unknown = sorted(set(fields) - set(field_names()))
        if unknown:
            if set(unknown) <= _POLICY_FIELDS:
                raise ValueError(
                    f"{', '.join(unknown)} belong to an adapter's PrefillPolicy, not to the method: pass "
                    "policy=PrefillPolicy(...); read_settings and make_settings of stem_attn.policy split a file"
                )
            raise ValueError(f"unknown config field {', '.join(unknown)}; known: {', '.join(field_names())}")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> StemConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is not a JSON object of known fields with values in range.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a config must be a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"a config must be a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)

    def to_json(self) -> str:
        """Return every field as one JSON object."""
        return self._json


# Fields that StemConfig once had.
_POLICY_FIELDS = {"dense_layers", "layer_budgets", "min_seq_len"}


def field_names() -> tuple[str, ...]:
    """Return the names of the fields that a user may set."""
    return tuple(f.name for f in dataclasses.fields(StemConfig) if f.init)


# What is left out here stands at the field's default.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "default-0.1": {"tail_ratio": 0.5, "head_floor": 0.5},  # of version 0.1; goes with version 0.3
    "official": {
        "score": "linear",
        "budget_scope": "head",
        "decay": 0.7,
        "value_term": "zscore",
        "budget_ratio": ((160, 0.2), (None, 0.1)),
        "budget_bias": 30,
        "dense_below": 56,
        "tail_blocks": 0,
        "sink_blocks": 4,
        "local_blocks": 4,
        "forced_blocks": "on_top",
    },
    "paper": {
        "score": "linear",
        "budget_scope": "head",
        "decay": 0.7,
        "budget_ratio": ((129, 0.2), (None, 0.1)),  # 16K tokens are 128 blocks
        "budget_bias": 0,
        "budget_floor": 54,
        "decay_from": "first_row",
        "tail_blocks": 0,
        "sink_blocks": 4,
        "local_blocks": 4,
    },
}


def _ratio_steps(value: Any) -> RatioSteps:
    """Normalise one ratio, or a sequence of (below, ratio) pairs, to steps that end without a bound."""
    steps = value if isinstance(value, tuple | list) else ((None, value),)
    expected = "budget_ratio must be a number or ((below, ratio), ..., (None, ratio)) with rising bounds"
    try:
        pairs = tuple((below, ratio) for below, ratio in steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got {value!r}") from error
    bounds = [below for below, _ in pairs[:-1]]
    if not pairs or pairs[-1][0] is not None or any(type(b) is not int for b in bounds):
        raise ValueError(f"{expected}, got {value!r}")
    if bounds != sorted(set(bounds)):
        raise ValueError(f"{expected}, got {value!r}")
    for _, ratio in pairs:
        check_float("budget_ratio", ratio, 0.0, 1.0)
    return tuple((below, float(ratio)) for below, ratio in pairs)


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Check that a field is an int within bounds."""
    if type(value) is not int or value < low or (high is not None and value > high):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name} must be an int {span}, got {value!r}")


def check_float(name: str, value: Any, low: float, high: float) -> None:
    """Check that a field is a finite number within bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Asked in this order: an int that no float holds has no `isfinite`.
    if not number or not low <= value <= min(high, sys.float_info.max) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, got {value!r}")


def check_precision(precision: Precision, residual: Residual) -> None:
    """Check that a precision is known, and nothing else is asked for that it is not computed with."""
    _check_choice("precision", precision, Precision)
    if precision != "auto" and residual != "none":
        raise ValueError(f"precision={precision!r} cannot be combined with residual={residual!r}")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
