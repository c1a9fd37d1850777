"""Run a model densely and sparsely on real text, and say what each method of sparse attention costs in fidelity.

Two kinds of numbers. `layers`: on the q, k, v of one dense forward, every method's attention against exact attention,
layer by layer as the forward reaches it, so that nothing of all layers is held at once. `propagated`: one forward a
method in which every full attention layer is sparse, its predictions against the dense forward's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stem_attn.lab.equal_density import Choice, UnreachableDensityError, mix, select_at_density, share_above
from stem_attn.lab.errors import InputError
from stem_attn.lab.intercept import Attend, intercept
from stem_attn.lab.layer_numbers import POSITION_BINS, DenseLayer, at_density
from stem_attn.lab.logits import PositionNumbers, compare_positions, keep_hidden
from stem_attn.lab.named_methods import NamedMethod
from stem_attn.lab.progress import OnStep
from stem_attn.lab.results import Record


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method at one density.

    Args:
        named: The method.
        density: Kept over causal blocks, the same in every layer; None: as published, whatever that gives.
    """

    named: NamedMethod
    density: float | None

    def __str__(self) -> str:
        return f"{self.named.name} at {'its own density' if self.density is None else f'{self.density:g}'}"

    def select(
        self, block_size: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, layer: int, layers: int
    ) -> tuple[Choice, ...]:
        """Select for a layer; see `select_at_density`."""
        return select_at_density(self.named, block_size, self.density, q, k, v, scale, layer=layer, layers=layers)


@dataclass(slots=True)
class Found:
    """All numbers of a run.

    Args:
        layers: A row for every prompt, candidate and full attention layer.
        propagated: A row for every prompt and candidate.
        other_calls: Attention calls of a forward that are not full causal attention, by reason; they stay exact.
        unreachable: Cases left out, with the layer that a method could not bring to the density, and why.
    """

    layers: list[Record] = field(default_factory=list)
    propagated: list[Record] = field(default_factory=list)
    other_calls: dict[str, int] = field(default_factory=dict)
    unreachable: dict[Candidate, str] = field(default_factory=dict)

    def drop(self, candidate: Candidate, reason: str) -> None:
        """Leave a candidate out, and forget what was measured of it."""
        self.unreachable[candidate] = reason
        names = _names(candidate)
        for rows in (self.layers, self.propagated):
            rows[:] = [row for row in rows if not names.items() <= row.items()]

    def left(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that are not left out."""
        return [candidate for candidate in candidates if candidate not in self.unreachable]


@torch.inference_mode()
def measure_prompt(
    model: Any,
    ids: Tensor,
    candidates: Sequence[Candidate],
    *,
    prompt: int,
    block_size: int,
    logit_stride: int,
    on_step: OnStep,
    found: Found,
) -> None:
    """Add one prompt's numbers to `found`.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T].
        candidates: What to measure.
        prompt: The prompt's number, for the rows.
        block_size: Tokens a block, of every method.
        logit_stride: Compare the predictions of every so many positions.
        on_step: Told what starts: once a layer of the dense forward, once a candidate's sparse forwards.
        found: Rows are added.

    Raises:
        InputError: The prompt is one block, or the model has no full attention layer to measure.
    """
    if ids.shape[1] <= block_size:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, which is one block of {block_size}: there is nothing to prune; "
            f"take a larger --length or a smaller --block-size"
        )
    ids = ids.to(model.device)
    layers = model.config.get_text_config().num_hidden_layers

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        on_step(f"layer {layer}")
        dense = DenseLayer(q, k, v, scale)
        for candidate in found.left(candidates):
            try:
                choices = candidate.select(block_size, q, k, v, dense.scale, layer, layers)
            except UnreachableDensityError as error:
                found.drop(candidate, f"layer {layer}: {error}")
                continue
            numbers = at_density([dense.measure(choice) for choice in choices], candidate.density)
            found.layers.append({"prompt": prompt, **_names(candidate), "layer": layer, **dataclasses.asdict(numbers)})
        return dense.out

    dense_hidden, found.other_calls = _forward(model, ids, observe)
    if found.left(candidates) and not any(row["prompt"] == prompt for row in found.layers):
        raise InputError(f"no layer of this model is full causal attention: {found.other_calls}")
    for candidate in found.left(candidates):
        try:
            row = _propagate(model, ids, candidate, dense_hidden, block_size, logit_stride, on_step)
        except UnreachableDensityError as error:
            found.drop(candidate, f"sparse forward: {error}")
            continue
        found.propagated.append({"prompt": prompt, **_names(candidate), **row})
    if not found.left(candidates):
        raise InputError(next(iter(found.unreachable.values())))


def _forward(model: Any, ids: Tensor, attend: Attend) -> tuple[Any, dict[str, int]]:
    """Run the model with a function in the place of full attention; return hidden states and the other calls."""
    with intercept(model, attend) as others, keep_hidden(model) as hidden:
        model(ids, use_cache=False, logits_to_keep=1)
    return hidden[0], dict(others)


def _propagate(
    model: Any,
    ids: Tensor,
    candidate: Candidate,
    dense_hidden: Any,
    block_size: int,
    logit_stride: int,
    on_step: OnStep,
) -> Record:
    """Run the model sparsely in every layer; twice and interpolated, where the density lies between two choices."""
    runs: list[tuple[float, Record]] = []
    sides = 1
    on_step(str(candidate))
    while len(runs) < sides:
        hidden, density, sides = _sparse_forward(model, ids, candidate, block_size, side=len(runs))
        numbers = compare_positions(model, dense_hidden, hidden, ids, stride=logit_stride)
        runs.append((density, _prediction_row(numbers)))
    (density, row), (density_above, above) = runs[0], runs[-1]
    weight = 0.0 if candidate.density is None else share_above(density, density_above, candidate.density)
    return {"density": mix(density, density_above, weight)} | {
        name: mix(row[name], above[name], weight) for name in row
    }


def _sparse_forward(
    model: Any, ids: Tensor, candidate: Candidate, block_size: int, side: int
) -> tuple[Any, float, int]:
    """Run the model with one of the enclosing choices in every layer.

    Returns:
        Hidden states, the density of all layers together, and the most choices that any layer had.
    """
    kept, causal, sides = 0, 0, 1
    layers = model.config.get_text_config().num_hidden_layers

    def sparse(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        nonlocal kept, causal, sides
        choices = candidate.select(block_size, q, k, v, scale, layer, layers)
        choice = choices[min(side, len(choices) - 1)]
        kept += int(choice.selection.counts.sum())
        causal += choice.selection.counts.shape[1] * choice.selection.grid.causal_blocks
        sides = max(sides, len(choices))
        return choice.attend(q, k, v, scale)

    hidden, _ = _forward(model, ids, sparse)
    return hidden, kept / causal, sides


def _prediction_row(numbers: PositionNumbers) -> Record:
    return {
        "kl_nats": numbers.mean_kl_nats,
        "top1_agreement": numbers.top1_agreement,
        "dense_nll": float(numbers.dense_nll.mean()),
        "sparse_nll": float(numbers.sparse_nll.mean()),
        "kl_by_position": _eighth_means(numbers.kl_nats),
        "top1_by_position": _eighth_means(numbers.agrees),
    }


def _eighth_means(values: Tensor) -> list[float]:
    return [float(part.double().mean()) for part in values.tensor_split(POSITION_BINS)]


def _names(candidate: Candidate) -> Record:
    return {"method": candidate.named.name, "target": candidate.density}
