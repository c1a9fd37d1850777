"""Measure one case: build the contenders, check them, time what passed, and put the numbers in one record."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import budget_of
from stem_attn.config import StemConfig
from stem_attn.lab.bench import contenders
from stem_attn.lab.bench.cases import Case
from stem_attn.lab.bench.contenders import Contender, Problem, UnavailableError
from stem_attn.lab.bench.limit import limit
from stem_attn.lab.gate import AttentionGate, Errors, GateError, Sample, check_selection, draw_samples
from stem_attn.lab.progress import OnStep
from stem_attn.lab.results import Record
from stem_attn.lab.timing import first_call, peak_extra_mib, time_rounds
from stem_attn.scoring import block_scores
from stem_attn.selection import select_top_blocks


@torch.inference_mode()
def run_case(
    case: Case,
    config: StemConfig,
    names: list[str],
    *,
    rounds: int,
    seed: int,
    on_step: OnStep,
    softcap: float | None = None,
    sinks: bool = False,
) -> Record:
    """Measure the named contenders on one problem.

    Args:
        case: The problem.
        config: The method's settings.
        names: From `contenders.names()`.
        rounds: Measurements of each contender.
        seed: Of the inputs and of the rows that are checked.
        on_step: Told what starts: once a contender, once a round.
        softcap: With which backends are measured too, beside without.
        sinks: Whether they are then measured with sinks, drawn from a normal distribution.

    Returns:
        A record of plain values: the case, `density`, `methods` that were timed, and those `skipped` or `failed`
        with the reason.
    """
    q, k, v = case.inputs(seed)
    samples = draw_samples(case.batch, case.shape.heads, case.q_len, seed)
    # The selection that all attention kernels are given comes from plain torch, whatever the backends do.
    grid = BlockGrid(case.q_len, case.k_len, config.block_size)
    scores = block_scores(q, k, v, config, case.shape.head_dim**-0.5)
    selection = select_top_blocks(scores, budget_of(config, (case.k_len,)).rows(grid), grid, config, k.shape[1])
    del scores
    check_selection(q, k, v, selection, config, samples)
    gen = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(case.shape.heads, generator=gen, dtype=torch.float32, device="cpu").to(q) if sinks else None
    problem = Problem(q, k, v, config, selection, softcap, drawn)
    gates = _Gates(problem, samples)

    ready: list[Contender] = []
    entries: list[Record] = []
    skipped: list[Record] = []
    failed: list[Record] = []
    for name in names:
        on_step(f"{case.k_len} tokens, checking {name}")
        for contender in _prepared(name, problem, skipped, failed):
            try:
                first_s, errors, allowed = gates.check(contender)
                peak = peak_extra_mib(contender.run, case.device)
            except Exception as error:  # one that is wrong or breaks must not take the others' numbers along
                failed.append({"name": contender.name, "part": contender.part, "reason": _one_line(error)})
                continue
            ready.append(contender)
            entries.append(
                {
                    "name": contender.name,
                    "part": contender.part,
                    "first_call_s": first_s,
                    "peak_extra_mib": peak,
                    "error": asdict(errors) if errors else None,
                    "error_allowed": asdict(allowed) if allowed else None,
                }
            )

    limit_name, limit_run, limit_flops = limit(case.device, case.dtype)
    limit_run()
    times, states = time_rounds(
        [limit_run, *(contender.run for contender in ready)],
        case.device,
        rounds,
        on_round=lambda number: on_step(f"{case.k_len} tokens, timing {len(ready)} contenders, round {number}"),
    )
    limit_tflops = limit_flops / times[0].median / 1e9
    flops = {"dense": case.causal_flops(), "attention": case.kept_flops(selection)}
    flops["whole"] = flops["attention"]
    for entry, t in zip(entries, times[1:], strict=True):
        entry["ms"] = {**t.describe(), "samples": list(t.samples)}
        entry["host_ms"] = statistics.median(t.host) if t.host else None
        if entry["part"] in flops:
            entry["tflops"] = flops[entry["part"]] / t.median / 1e9
            entry["limit_share"] = entry["tflops"] / limit_tflops
    _compare(entries)
    return {
        "batch": case.batch,
        **asdict(case.shape),
        "q_len": case.q_len,
        "k_len": case.k_len,
        "density": selection.density(),
        "ideal_speedup": 1 / selection.density(),
        "causal_tflop": case.causal_flops() / 1e12,
        "kept_tflop": case.kept_flops(selection) / 1e12,
        "limit": {"name": limit_name, "tflops": limit_tflops},
        "gpu_state": [asdict(s) for s in states],
        "methods": entries,
        "skipped": skipped,
        "failed": failed,
    }


def _prepared(name: str, problem: Problem, skipped: list[Record], failed: list[Record]) -> list[Contender]:
    """Prepare what can run under a contender's name, and note what cannot, with the reason."""
    found: list[Contender] = []
    for label, prepare in contenders.variants(name, problem):
        try:
            found += prepare()
        except UnavailableError as reason:
            skipped.append({"name": label, "reason": str(reason)})
            break  # what follows asks for more
        except Exception as error:  # as above
            failed.append({"name": label, "part": None, "reason": _one_line(error)})
            break
    return found


def _compare(entries: list[Record]) -> None:
    """Add ratios of medians: the speed-up over each dense contender, and the selection's share of its whole.

    What a softcap or sinks cost is a median of ratios, round by round.
    """
    medians = {(e["name"], e["part"]): e["ms"]["median"] for e in entries}
    dense = [name for name, part in medians if part == "dense"]
    for e in entries:
        if e["part"] in ("attention", "whole"):
            e["speedup"] = {name: medians[name, "dense"] / e["ms"]["median"] for name in dense}
        plain = next((x for x in entries if (x["name"], x["part"]) == (e["name"].split()[0], e["part"])), e)
        if plain is not e:
            pairs = zip(e["ms"]["samples"], plain["ms"]["samples"], strict=True)
            e["over_plain"] = statistics.median(ms / plain_ms for ms, plain_ms in pairs)
        whole = medians.get((e["name"], "whole"))
        if e["part"] == "selection" and whole:
            e["share_of_whole"] = e["ms"]["median"] / whole


class _Gates:
    """Check any contender of a problem; the exact rows are computed once for each set of kept blocks."""

    def __init__(self, problem: Problem, samples: list[Sample]) -> None:
        self._problem = problem
        self._samples = samples
        self._kept: dict[bool, AttentionGate] = {}
        self._dense: AttentionGate | None = None

    def check(self, contender: Contender) -> tuple[float, Errors | None, Errors | None]:
        """Run a contender for the first time and check what it gives.

        Returns:
            Seconds of the first call; the errors found and allowed, None for a selection.

        Raises:
            GateError: The contender is wrong.
        """
        p, plain = self._problem, contender.plain
        properties = self._properties(plain)
        if contender.part == "selection":
            selection, seconds = first_call(contender.run, p.q.device)
            check_selection(p.q, p.k, p.v, selection, p.config, self._samples, **properties)
            return seconds, None, None
        if contender.run_with_selection:
            (out, selection), seconds = first_call(contender.run_with_selection, p.q.device)
            gate = self._kept_gate(plain)
            if not plain or not _same(selection, p.selection):
                check_selection(p.q, p.k, p.v, selection, p.config, self._samples, **properties)
                gate = self._gate(selection, plain)
            gate.check(contender.run())  # what is timed returns no selection
        else:
            out, seconds = first_call(contender.run, p.q.device)
            gate = self._kept_gate(plain) if contender.part == "attention" else self._dense_gate()
        return seconds, gate.check(out), gate.budget

    def _dense_gate(self) -> AttentionGate:
        if self._dense is None:
            self._dense = self._gate(None, plain=True)
        return self._dense

    def _kept_gate(self, plain: bool) -> AttentionGate:
        if plain not in self._kept:
            self._kept[plain] = self._gate(self._problem.selection, plain)
        return self._kept[plain]

    def _gate(self, selection: BlockSelection | None, plain: bool) -> AttentionGate:
        p = self._problem
        precision = "auto" if plain else p.config.precision
        return AttentionGate(p.q, p.k, p.v, selection, self._samples, precision=precision, **self._properties(plain))

    def _properties(self, plain: bool) -> dict[str, Any]:
        return {} if plain else {"softcap": self._problem.softcap, "sinks": self._problem.sinks}


def _same(a: BlockSelection, b: BlockSelection) -> bool:
    """Whether two selections of a problem keep the same blocks."""
    width = min(a.indices.shape[-1], b.indices.shape[-1])  # the rest is padding if the counts agree
    return torch.equal(a.counts, b.counts) and torch.equal(a.indices[..., :width], b.indices[..., :width])


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if not isinstance(error, GateError) else text
