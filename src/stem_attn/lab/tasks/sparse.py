"""A model's prefill under one method of sparse attention, and what it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_attn.integrations import hf
from stem_attn.lab.equal_density import select_at_density
from stem_attn.lab.errors import InputError
from stem_attn.lab.intercept import intercept
from stem_attn.lab.named_methods import NamedMethod


@dataclass(frozen=True, slots=True)
class Kept:
    """What a prefill attended to.

    Args:
        budget: Kept over causal blocks of the layers with full attention, dense ones counted as 1.
        layers: Layers by what they were: "sparse", "sliding window", or the reason for dense attention.
    """

    budget: float
    layers: dict[str, int]


@contextmanager
def running(model: Any, named: NamedMethod, block_size: int, density: float | None) -> Iterator[Callable[[], Kept]]:
    """Run a model's prefill with a method inside a `with` block.

    Methods with their own budget run as users run them, through the Hugging Face adapter, but without its crossover;
    dense is the model as it came.

    Args:
        model: A transformers causal language model.
        named: The method.
        block_size: Tokens a block, unless the method says otherwise.
        density: Kept over causal blocks that the method is brought to in every layer; None: its own budget.

    Yields:
        A function that says what was kept since it was last called.

    Raises:
        InputError: The model's attention cannot be routed.
        UnreachableDensityError: The method cannot keep so little; raised by the model's forward.
    """
    if named.base == "dense":
        yield lambda: Kept(1.0, {})
        return
    method = named.build(block_size)
    if density is None:
        try:
            hf.enable(model, method=method, policy=named.policy)
        except ValueError as error:
            raise InputError(str(error)) from error
        try:
            yield lambda: _from_adapter(model)
        finally:
            hf.disable(model)
        return

    densities: list[Tensor] = []  # of each layer, so that the device is asked once a prompt

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        choice = select_at_density(named, block_size, density, q, k, v, scale)[0]
        selection = choice.selection
        heads = selection.counts.shape[0] * selection.counts.shape[1]
        densities.append(selection.counts.sum() / (heads * selection.grid.causal_blocks))
        return choice.attend(q, k, v, scale)

    with intercept(model, attend) as others:

        def kept() -> Kept:
            found = _kept(torch.stack(densities).tolist() if densities else [], dict(others))
            densities.clear()
            others.clear()
            return found

        yield kept


def _from_adapter(model: Any) -> Kept:
    stats = hf.stats(model)
    hf.reset_stats(model)
    densities = [] if stats.density is None else [stats.density] * stats.sparse
    return _kept(densities, {**stats.dense, **({"sliding window": stats.banded} if stats.banded else {})})


def _kept(densities: list[float], others: dict[str, int]) -> Kept:
    dense = sum(calls for reason, calls in others.items() if not reason.startswith("sliding window"))
    full = len(densities) + dense
    budget = (sum(densities) + dense) / full if full else 1.0
    return Kept(budget, {**({"sparse": len(densities)} if densities else {}), **others})
