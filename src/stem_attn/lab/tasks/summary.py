"""Scores by task, length and method, and each method's paired differences to dense attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, variance

from stem_attn.lab.results import Record
from stem_attn.lab.tasks.registry import TASKS
from stem_attn.lab.tasks.ruler.tasks import FAMILY as RULER

LEAST_DENSE_SCORE = 20.0
"""Points of dense attention below which a task says nothing about methods; RULER's mean is over all, as published."""

_NORMAL_95 = 1.959964
_PAIRED = ("minus_dense", "agreement", "drift")


def summarize(records: Sequence[Record]) -> Record:
    """Aggregate records of one model.

    Args:
        records: Of tasks, lengths, samples and methods, at least one; see `run.evaluate`.

    Returns:
        `model`, `machines` and so on: what the records come from. `tasks`: what their prompts are made of.
        `layers_alike`: the methods that a density kept from giving early layers more, as their `depth_decay` says.
        `cells`: for every task, length and method the mean score and budget, and the paired comparison with dense.
        `means`: for every family of tasks and every method the means over its cells, by length and altogether; every
        cell weighs the same. A mean over cells that the method did not run is None. `not_in_means`: the tasks and
        lengths that dense attention does not master, with its score.

        Comparisons: `minus_dense`, points of the score; `agreement`, percent of answers equal to dense attention's;
        `drift`, the log-probability, in nats a token, that dense attention's own answer loses. Each has its `mean`, its
        `standard_error` and the 95% `interval` of the normal approximation: too narrow for a few samples, and of no
        width where no sample differs. They are None where dense was not run, the errors also for a single sample.
    """
    found: dict[tuple[str, int], dict[str, dict[int, Record]]] = {}
    for record in records:
        place = (record["task"], record["length"])
        found.setdefault(place, {}).setdefault(record["method"], {})[record["index"]] = record
    methods = sorted({record["method"]: None for record in records}, key=lambda name: name != "dense")
    cells = [
        _cell(task, length, method, by_method[method], by_method.get("dense"))
        for (task, length), by_method in found.items()
        for method in methods
        if method in by_method
    ]
    failed = {
        (cell["task"], cell["length"]): cell["score"]
        for cell in cells
        if cell["method"] == "dense" and cell["family"] != RULER and cell["score"] < LEAST_DENSE_SCORE
    }
    counted = [place for place in found if place not in failed]
    families = dict.fromkeys(TASKS[task].family for task, _ in counted)
    one = records[0]
    return {
        **{name: one[name] for name in ("model", "weights", "dtype", "seed")},
        "machines": sorted({record["machine"] for record in records}),
        "chat": any(record["chat"] for record in records),
        "tasks": {task: _sources(task, records) for task in TASKS if any(task == place[0] for place in found)},
        "layers": _layers(records),
        "layers_alike": _layers_alike(records),
        "cells": cells,
        "means": [_means(family, method, cells, counted) for family in families for method in methods],
        "not_in_means": [{"task": task, "length": length, "dense": score} for (task, length), score in failed.items()],
    }


def _sources(task: str, records: Sequence[Record]) -> list[str]:
    return sorted({source for record in records if record["task"] == task for source in record["sources"]})


def _layers(records: Sequence[Record]) -> list[Record]:
    """Return, for every method and length, a prompt's layers by what they were."""
    found: dict[tuple[str, int], Counter[str]] = {}
    prompts: Counter[tuple[str, int]] = Counter()
    for record in records:
        place = (record["method"], record["length"])
        found.setdefault(place, Counter()).update(record["layers"])
        prompts[place] += 1
    return [
        {
            "method": method,
            "length": length,
            "layers": {kind: total / prompts[method, length] for kind, total in counts.items()},
        }
        for (method, length), counts in found.items()
    ]


def _layers_alike(records: Sequence[Record]) -> list[str]:
    settings = {record["method"]: record["key"]["method"] for record in records}
    return [
        method
        for method, given in settings.items()
        if given.get("density") is not None and given.get("depth_decay", 1.0) != 1.0
    ]


def _cell(task: str, length: int, method: str, mine: dict[int, Record], dense: dict[int, Record] | None) -> Record:
    pairs = [] if dense is None else [(record, dense[index]) for index, record in mine.items() if index in dense]
    if method == "dense":
        pairs = []
    return {
        "task": task,
        "family": TASKS[task].family,
        "length": length,
        "method": method,
        "samples": len(mine),
        "prompt_tokens": fmean(record["prompt_tokens"] for record in mine.values()),
        "score": fmean(record["score"] for record in mine.values()),
        **{also: fmean(record[also] for record in mine.values()) for also in TASKS[task].also},
        "budget": fmean(record["budget"] for record in mine.values()),
        "minus_dense": _paired([one["score"] - other["score"] for one, other in pairs]),
        "agreement": _paired([100.0 * (one["answer"] == other["answer"]) for one, other in pairs]),
        "drift": _paired([_log_probability(other) - _log_probability(one) for one, other in pairs]),
    }


def _log_probability(record: Record) -> float:
    return float(record["dense_answer_log_probability"])


def _paired(values: list[float]) -> Record | None:
    if not values:
        return None
    return _estimate(fmean(values), math.sqrt(variance(values) / len(values)) if len(values) > 1 else None)


def _estimate(mean: float, error: float | None) -> Record:
    interval = None if error is None else [mean - _NORMAL_95 * error, mean + _NORMAL_95 * error]
    return {"mean": mean, "standard_error": error, "interval": interval}


def _means(family: str, method: str, cells: list[Record], counted: list[tuple[str, int]]) -> Record:
    places = [place for place in counted if TASKS[place[0]].family == family]
    mine = {(cell["task"], cell["length"]): cell for cell in cells if cell["method"] == method}
    lengths = sorted({length for _, length in places})

    def of(length: int | None) -> list[Record] | None:
        """Return the method's cells, if it ran all."""
        wanted = [place for place in places if length in (None, place[1])]
        return [mine[place] for place in wanted] if all(place in mine for place in wanted) else None

    def mean(field: str, length: int | None = None) -> float | None:
        ran = of(length)
        return None if ran is None else fmean(cell[field] for cell in ran)

    return {
        "family": family,
        "method": method,
        "tasks": len({task for task, _ in places}),
        "by_length": {length: mean("score", length) for length in lengths},
        "budget_by_length": {length: mean("budget", length) for length in lengths},
        "average": mean("score"),
        "budget": mean("budget"),
        **{field: _mean_of([cell[field] for cell in of(None) or []]) for field in _PAIRED},
    }


def _mean_of(estimates: list[Record | None]) -> Record | None:
    known = [estimate for estimate in estimates if estimate is not None]
    if not known or len(known) < len(estimates):
        return None
    errors = [estimate["standard_error"] for estimate in known]
    error = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return _estimate(fmean(estimate["mean"] for estimate in known), error)
