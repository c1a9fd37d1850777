"""Check audits of a model's layers against all rows, and time a prefill with and without them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stem_attn import backends
from stem_attn.api import stem_attention
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.integrations import hf
from stem_attn.lab.devices import synchronize
from stem_attn.lab.equal_density import Choice
from stem_attn.lab.errors import InputError
from stem_attn.lab.intercept import intercept
from stem_attn.lab.layer_numbers import DenseLayer
from stem_attn.lab.results import Record
from stem_attn.lab.timing import Times
from stem_attn.layout import Layout
from stem_attn.methods import Stem
from stem_attn.policy import PrefillPolicy
from stem_attn.run import audit

OnStep = Callable[[str], None]

TIMED = ("dense", "sparse", "audited", "audited with a target")


@torch.inference_mode()
def check_layers(
    model: Any, ids: Tensor, config: StemConfig, policy: PrefillPolicy, *, draws: int, on_step: OnStep
) -> list[Record]:
    """Run a prompt sparsely in every layer, and compare audits of each layer with the truth.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T].
        config: The method.
        policy: Its `audit_rows` and its budgets by layer.
        draws: Audits of a layer, each with other rows.
        on_step: Told what starts, once a layer.

    Returns:
        A record a layer: density, true recall and error; of the audits the mean, the widest half-width, and how many
        of their intervals hold the truth.

    Raises:
        InputError: The model has no full attention layer.
    """
    layers = model.config.get_text_config().num_hidden_layers
    found: list[Record] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        on_step(f"layer {layer}")
        own = policy.layer_config(config, layer, layers)
        dense = DenseLayer(q, k, v, scale)
        out, selection = stem_attention(q, k, v, config=own, scale=dense.scale, return_selection=True)
        truth = dense.measure(Choice(Stem(own), selection))
        call = Call(Layout.dense(q, k, v), own.block_size, dense.scale)
        backend = backends.for_call("auto", call, again=True)
        audits = [
            audit(call, [selection], out, backend, rows=policy.audit_rows, seed=layer * draws + draw).read()
            for draw in range(draws)
        ]
        record: Record = {"layer": layer, "density": truth.density, "rows": audits[0].rows}
        for name, true in (("recall", truth.recall), ("error", truth.error)):
            estimates = [getattr(a, name) for a in audits]
            record[name] = {
                "true": true,
                "mean": sum(e.value for e in estimates) / draws,
                "half_width": max((e.high - e.low) / 2 for e in estimates),
                "held": sum(e.low <= true <= e.high for e in estimates) / draws,
            }
        found.append(record)
        return out

    with intercept(model, attend) as others:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    if not found:
        raise InputError(f"no layer of this model is full causal attention: {dict(others)}")
    return found


@torch.inference_mode()
def time_prefills(
    model: Any, ids: Tensor, config: StemConfig, policy: PrefillPolicy, *, rounds: int, on_step: OnStep
) -> Record:
    """Time the prefill of a prompt densely, sparsely, with an audit, and with one that decides.

    The deciding one has a target that every layer meets, so nothing is attended to again: where the host decides it
    waits for the device, and where the device does it launches attention that ends at once.

    Args:
        model: A transformers causal language model.
        ids: int64 [1, T].
        config: The method.
        policy: With `audit_rows`.
        rounds: Everything is timed once a round, after one round that is not.
        on_step: Told what starts, once a prefill.

    Returns:
        Milliseconds of wall-clock time until the device is done, by name of `TIMED`, and the audited ones' over the
        sparse one's, medians of the rounds' ratios.
    """
    ids = ids.to(model.device)
    plain = dataclasses.replace(policy, audit_rows=0, min_recall=None, max_error=None)
    policies = {
        "sparse": plain,
        "audited": dataclasses.replace(plain, audit_rows=policy.audit_rows),
        "audited with a target": dataclasses.replace(plain, audit_rows=policy.audit_rows, max_error=1e9),
    }
    samples: dict[str, list[float]] = {name: [] for name in TIMED}
    for number in range(rounds + 1):
        first = number % len(TIMED)
        for name in (*TIMED[first:], *TIMED[:first]):
            on_step(name)
            if name != "dense":
                hf.enable(model, config, policy=policies[name])
            milliseconds = _time_forward(model, ids)
            if name != "dense" and hf.stats(model).redone:
                raise InputError("a layer's output is no number, so no audit can be timed")
            hf.disable(model)
            if number:
                samples[name].append(milliseconds)
    record: Record = {"ms": {name: Times(tuple(times)).describe() for name, times in samples.items()}}
    for name in TIMED[2:]:
        ratios = [one / base for one, base in zip(samples[name], samples["sparse"], strict=True)]
        record[f"{name} over sparse"] = Times(tuple(ratios)).describe()
    return record


def work_share(rows: int, heads: int, tokens: int) -> float:
    """Return an audit's multiplications over those of dense causal attention, the rows' masked halves included."""
    return 2 * rows / (heads * tokens)


def summarise(layers: Sequence[Record]) -> Record:
    """Return of all layers and prompts: the share of intervals that hold the truth, and the widest half-width."""
    return {
        name: {
            "held": sum(row[name]["held"] for row in layers) / len(layers),
            "half_width": max(row[name]["half_width"] for row in layers),
        }
        for name in ("recall", "error")
    }


def _time_forward(model: Any, ids: Tensor) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return (time.perf_counter() - start) * 1e3
