"""Bring a method to a density, for comparisons at equal cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.checks import check_qkv, resolve_prompt_len, resolve_scale
from stem_attn.config import StemConfig
from stem_attn.method import Method
from stem_attn.methods.base import Knob, Rival, one_a_row
from stem_attn.methods.stem import Stem

# Stem's knob is the blocks of the first rows: its decay and everything else stay.
_STEM = Knob("budget_bias", low=1, high=None, rising=True, whole=True)
_MOST_STEPS = 50


def match_density(
    method: Method,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: float,
    *,
    scale: float | None = None,
    prompt_len: int | Sequence[int] | Tensor | None = None,
    tolerance: float = 0.001,
) -> Method:
    """Set a method's knob so that its selection for these inputs has a given density.

    Bisection over the field that the method declares as its knob. Of `Stem` it is the budget of the first rows, in
    blocks, at any prompt length; its decay stays.

    Args:
        method: The method; its other fields stay.
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        density: Wanted kept over causal blocks, all heads and rows together.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        prompt_len: Tokens of the whole prompt; default Tk.
        tolerance: How close is close enough.

    Returns:
        A copy of the method with the knob set. Where no value comes within `tolerance`, for instance because the knob
        is an int, the one that comes closest.

    Raises:
        ValueError: The method has no knob, or the density lies outside what its knob can reach.
    """
    check_qkv(q, k, v)
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    knob = _STEM if isinstance(method, Stem) else method.knob if isinstance(method, Rival) else None
    if knob is None:
        raise ValueError(f"{type(method).__name__} has no knob that changes its density")
    measure = _measure(method, q, k, v, scale, prompt_len)
    low, high = knob.low, float(k.shape[2]) if knob.high is None else knob.high
    ends = [(value, measure(_turned(method, knob, value))) for value in (low, high)]
    least, most = sorted(reached for _, reached in ends)
    if not least - tolerance <= density <= most + tolerance:
        raise ValueError(
            f"{type(method).__name__} reaches densities from {least:.4f} to {most:.4f} here with {knob.field}, "
            f"not {density:.4f}"
        )
    best, reached = min(ends, key=lambda end: abs(end[1] - density))
    for _ in range(_MOST_STEPS):
        if abs(reached - density) <= tolerance or (knob.whole and high - low <= 1):
            break
        middle = (low + high) // 2 if knob.whole else (low + high) / 2
        found = measure(_turned(method, knob, middle))
        if abs(found - density) < abs(reached - density):
            best, reached = middle, found
        if (found < density) == knob.rising:
            low = middle
        else:
            high = middle
    return _turned(method, knob, best)


def first_rows_keep(config: StemConfig, blocks: int) -> StemConfig:
    """Rescale a schedule: the first rows keep `blocks`, at any prompt length; decay, forced blocks and scoring stay."""
    return dataclasses.replace(
        config, budget_ratio=0.0, budget_bias=blocks, budget_scale=1.0, budget_floor=1, dense_below=0
    )


def _turned(method: Method, knob: Knob, value: float) -> Method:
    """Return the method with its knob at a value."""
    if isinstance(method, Stem):
        return dataclasses.replace(method, config=first_rows_keep(method.config, int(value)))
    return cast(Method, dataclasses.replace(cast(Any, method), **{knob.field: int(value) if knob.whole else value}))


def _measure(
    method: Method, q: Tensor, k: Tensor, v: Tensor, scale: float | None, prompt_len: Any
) -> Callable[[Method], float]:
    """Return what tells the density of a method that differs from the given one in its knob only."""
    if not isinstance(method, Rival):
        return lambda turned: turned.select(q, k, v, scale=scale, prompt_len=prompt_len).density()
    grid = BlockGrid(q.shape[2], k.shape[2], method.block_size)
    lengths = one_a_row(resolve_prompt_len(prompt_len, q.shape[0], grid.k_len), q.shape[0])
    estimate = method.estimate(q, k, v, grid, resolve_scale(scale, q.shape[3]))

    def density(turned: Method) -> float:
        kept = cast(Rival, turned).mask(estimate, grid, lengths, q)
        return int(kept.sum()) / (q.shape[0] * q.shape[1] * grid.causal_blocks)

    return density
