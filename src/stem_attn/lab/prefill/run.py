"""Prefill one prompt with dense attention and with Stem, and compare: time, memory, outputs, answers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_attn.config import StemConfig
from stem_attn.integrations import hf
from stem_attn.lab.devices import synchronize
from stem_attn.lab.errors import InputError
from stem_attn.lab.logits import compare_positions, keep_hidden
from stem_attn.lab.prefill.measure import AttentionClock, PeakMemory
from stem_attn.policy import PrefillPolicy

_WARM_UP_TOKENS = 256

OnLayer = Callable[[str], None]
"""Told the name of a prefill whenever a layer's attention is done."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one way of attention did to the prompt.

    Args:
        prefill_seconds: Fastest round, from the token ids to the last position's logits (time to first token).
        attention_seconds: Inside attention, in that round.
        peak_bytes: Most memory over the loaded model, in any round: cache, activations, workspaces.
        rounds_seconds: Every round's prefill.
        perplexity: Over the prompt.
        answer: Greedy continuation.
    """

    prefill_seconds: float
    attention_seconds: float
    peak_bytes: int
    rounds_seconds: tuple[float, ...]
    perplexity: float
    answer: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dense against Stem on one prompt.

    Args:
        dense: The model as it came.
        stem: The same model with Stem enabled.
        density: Kept over causal blocks, all sparse calls together.
        sparse_layers: Layers that ran sparse.
        other_layers: Layers that did not, by reason.
        top1_agreement: Share of prompt positions where both predict the same next token.
        mean_kl_nats: Mean over the positions of KL(dense || stem) of the next-token distributions.
    """

    dense: Side
    stem: Side
    density: float
    sparse_layers: int
    other_layers: dict[str, int]
    top1_agreement: float
    mean_kl_nats: float


@dataclass(slots=True)
class _Pass:
    """One prefill: what it took and what it left."""

    seconds: float
    attention_seconds: float
    peak_bytes: int
    hidden: Any  # the base model's output, last hidden states only
    logits: Tensor  # [vocab], of the last position
    cache: Any


@torch.inference_mode()
def compare(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    config: StemConfig,
    policy: PrefillPolicy,
    *,
    new_tokens: int,
    on_layer: OnLayer,
    rounds: int,
) -> Comparison:
    """Prefill a prompt densely and with Stem, in turns, and compare the two.

    Both sides run the same code on the same weights; only the attention function differs.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        ids: int64 [1, T], the prompt.
        config: The method.
        policy: Which layers are sparse; whether that pays on this machine does not count.
        new_tokens: Most tokens of each answer.
        on_layer: Told what is done.
        rounds: Prefills of each side; the fastest counts.

    Raises:
        InputError: The model cannot run with Stem, or no layer ran sparse.
    """
    ids = ids.to(model.device)
    with _stem(model, config, policy):
        pass  # learn at once whether the model can
    _run_prompt(model, ids[:, :_WARM_UP_TOKENS], "warm-up", on_layer)

    density = 0.0
    passes: dict[str, list[_Pass]] = {"dense": [], "stem": []}
    answers: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for side, attention in (("dense", nullcontext()), ("stem", _stem(model, config, policy))):
            with attention:
                done = _run_prompt(model, ids, f"{side} {number}/{rounds}", on_layer)
                if side == "stem":
                    stats = hf.stats(model)
                if number == 1:
                    answers[side] = tokenizer.decode(_continue(model, done, new_tokens), skip_special_tokens=True)
            done.cache = None  # every pass starts from the same memory
            done.hidden = done.hidden if number == 1 else None
            passes[side].append(done)
        if stats.density is None:
            reasons = ", ".join(f"{reason}: {calls} layers" for reason, calls in stats.dense.items())
            raise InputError(f"no layer ran sparse, so there is nothing to compare ({reasons})")
        density = stats.density

    fidelity = compare_positions(model, passes["dense"][0].hidden, passes["stem"][0].hidden, ids)
    return Comparison(
        dense=_side(passes["dense"], fidelity.dense_perplexity, answers["dense"]),
        stem=_side(passes["stem"], fidelity.sparse_perplexity, answers["stem"]),
        density=density,
        sparse_layers=stats.sparse,
        other_layers={**stats.dense, **({"sliding window": stats.banded} if stats.banded else {})},
        top1_agreement=fidelity.top1_agreement,
        mean_kl_nats=fidelity.mean_kl_nats,
    )


@contextmanager
def _stem(model: Any, config: StemConfig, policy: PrefillPolicy) -> Iterator[None]:
    try:
        hf.enable(model, config, policy=dataclasses.replace(policy, crossover=False))
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        yield
    finally:
        hf.disable(model)


def _run_prompt(model: Any, ids: Tensor, name: str, on_layer: OnLayer) -> _Pass:
    """Run the whole prompt through the model; logits for the last position only."""
    clock = AttentionClock(model, lambda: on_layer(name))
    with keep_hidden(model) as hidden, PeakMemory(model.device) as memory, clock:
        synchronize(model.device)
        start = time.perf_counter()
        result = model(ids, use_cache=True, logits_to_keep=1)
        synchronize(model.device)
        seconds = time.perf_counter() - start
    return _Pass(seconds, clock.seconds, memory.bytes, hidden[0], result.logits[0, -1], result.past_key_values)


def _continue(model: Any, done: _Pass, new_tokens: int) -> list[int]:
    """Decode greedily from a prefill's cache."""
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    tokens: list[int] = []
    token = done.logits.argmax()
    while len(tokens) < new_tokens and int(token) not in stops:
        tokens.append(int(token))
        token = model(token.view(1, 1), past_key_values=done.cache, use_cache=True).logits[0, -1].argmax()
    return tokens


def _side(passes: list[_Pass], perplexity: float, answer: str) -> Side:
    fastest = min(passes, key=lambda one: one.seconds)
    return Side(
        prefill_seconds=fastest.seconds,
        attention_seconds=fastest.attention_seconds,
        peak_bytes=max(one.peak_bytes for one in passes),
        rounds_seconds=tuple(one.seconds for one in passes),
        perplexity=perplexity,
        answer=answer,
    )
