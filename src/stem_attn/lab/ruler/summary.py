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
        records: Of tasks, lengths, samples and methods; with `method`, `task`, `length`, `index`, `score`, `budget` and
            `prompt_tokens`. A method that ran has every sample.
        methods: Their names, in the order of the tables.

    Returns:
        `cells`: for every task, length and method the mean score, budget and difference to dense. `methods`: for every
        method the means over its cells, by length and altogether; every cell weighs the same. A mean over cells that
        the method did not run is None.

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
        if method in by_method
    ]
    return {"cells": cells, "methods": [_method(name, cells, list(found)) for name in methods]}


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


def _method(name: str, cells: list[dict[str, Any]], places: list[tuple[str, int]]) -> dict[str, Any]:
    mine = {(cell["task"], cell["length"]): cell for cell in cells if cell["method"] == name}

    def mean(field: str, length: int | None = None) -> float | None:
        of = [mine[place][field] if place in mine else None for place in places if length in (None, place[1])]
        numbers = [number for number in of if number is not None]
        return fmean(numbers) if len(numbers) == len(of) else None

    lengths = sorted({length for _, length in places})
    difference, errors = mean("minus_dense"), [cell["standard_error"] for cell in mine.values()]
    known = difference is not None and None not in errors
    error = math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None
    return {
        "method": name,
        "by_length": {length: mean("score", length) for length in lengths},
        "budget_by_length": {length: mean("budget", length) for length in lengths},
        "average": mean("score"),
        "budget": mean("budget"),
        "minus_dense": difference,
        "standard_error": error,
        "interval": _interval(difference, error),
    }


def _interval(mean: float | None, error: float | None) -> list[float] | None:
    if mean is None or error is None:
        return None
    return [mean - _NORMAL_95 * error, mean + _NORMAL_95 * error]
