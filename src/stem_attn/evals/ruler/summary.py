"""Scores by task, length and method, and each method's paired difference to dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

_NORMAL_95 = 1.959964


def summarize(records: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Aggregate the records of a run.

    Args:
        records: Of every method, task, length and sample; with `method`, `task`, `length`, `index`, `score`,
            `budget` and `prompt_tokens`.
        methods: Their names, in the order of the tables.

    Returns:
        `cells`: for every task, length and method the mean score, budget and difference to dense. `methods`: for every
        method the means over its cells, by length and altogether; every cell weighs the same.

        A difference is paired, method minus dense on the same prompts, and its 95% interval is the normal
        approximation: too narrow for a few samples, and of no width where no sample differs. Both are None where dense
        was not run, the interval also for a single sample.
    """
    found: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for record in records:
        place = (record["task"], record["length"])
        found.setdefault(place, {}).setdefault(record["method"], {})[record["index"]] = record
    cells = [
        _cell(task, length, method, by_method[method], by_method.get("dense"))
        for (task, length), by_method in found.items()
        for method in methods
    ]
    return {"cells": cells, "methods": [_method(name, cells) for name in methods]}


def _cell(
    task: str, length: int, method: str, mine: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]] | None
) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "task": task,
        "length": length,
        "method": method,
        "samples": len(mine),
        "prompt_tokens": fmean(record["prompt_tokens"] for record in mine.values()),
        "score": fmean(record["score"] for record in mine.values()),
        "budget": fmean(record["budget"] for record in mine.values()),
        "minus_dense": None,
        "standard_error": None,
    }
    if dense is not None and method != "dense":
        differences = [record["score"] - dense[index]["score"] for index, record in mine.items()]
        cell["minus_dense"] = fmean(differences)
        if len(differences) > 1:
            cell["standard_error"] = math.sqrt(variance(differences) / len(differences))
    return cell | {"interval": _interval(cell["minus_dense"], cell["standard_error"])}


def _method(name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [cell for cell in cells if cell["method"] == name]
    lengths = sorted({cell["length"] for cell in mine})
    difference = error = None
    if all(cell["minus_dense"] is not None for cell in mine):
        difference = fmean(cell["minus_dense"] for cell in mine)
    if all(cell["standard_error"] is not None for cell in mine):
        error = math.sqrt(sum(cell["standard_error"] ** 2 for cell in mine)) / len(mine)
    return {
        "method": name,
        "by_length": {length: fmean(c["score"] for c in mine if c["length"] == length) for length in lengths},
        "budget_by_length": {length: fmean(c["budget"] for c in mine if c["length"] == length) for length in lengths},
        "average": fmean(cell["score"] for cell in mine),
        "budget": fmean(cell["budget"] for cell in mine),
        "minus_dense": difference,
        "standard_error": error,
        "interval": _interval(difference, error),
    }


def _interval(mean: float | None, error: float | None) -> list[float] | None:
    if mean is None or error is None:
        return None
    return [mean - _NORMAL_95 * error, mean + _NORMAL_95 * error]
