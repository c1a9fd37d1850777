"""The tables of `eval` in a terminal of 100 columns: nothing is wider, and no cell is folded or cut."""

import io

import pytest
from rich.console import Console

from stem_attn.lab.fidelity import report as fidelity
from stem_attn.lab.tasks import report as tasks


def lines(view, columns):
    file = io.StringIO()
    Console(file=file, width=columns).print(view)
    return file.getvalue().splitlines()


def estimate(mean, half):
    return {"mean": mean, "standard_error": half / 2, "interval": [mean - half, mean + half]}


def answers(lengths, methods=("dense", "stem-official", "flashprefill")):
    """The record of `eval tasks` with the widest numbers that there are."""
    names = ("passage_retrieval", "niah_multiquery")
    paired = {"minus_dense": estimate(-12.5, 10.3), "agreement": estimate(100, 12), "drift": estimate(0.123, 0.045)}
    row = {"score": 100.0, "budget": 1.0, "samples": 500, **paired}
    return {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16", "machines": ["NVIDIA H100 80GB HBM3, " * 6],
        "seed": 42, "chat": True, "tasks": dict.fromkeys(names, ()), "layers": [],
        "layers_alike": [], "not_in_means": [],
        "cells": [{"task": n, "method": m, "length": t, **row} for n in names for t in lengths for m in methods],
        "means": [
            {"family": f, "tasks": 13, "method": m, "by_length": dict.fromkeys(lengths, 100.0), "average": 100.0, **row}
            for f in ("RULER", "retrieval", "code") for m in methods
        ],
    }  # fmt: skip


@pytest.mark.parametrize("lengths", [[4096], [4096, 8192], [4096, 8192, 16384, 32768, 65536, 131072]])
@pytest.mark.parametrize("columns", [100, 160])
def test_scores_fit(lengths, columns):
    shown = lines(tasks.render(answers(lengths)), columns)
    assert max(map(len, shown)) <= 100
    for words, cells in [
        (("flashprefill",), ("100.0%", "-12.5±10.3", "100±12", "0.123±0.045")),
        (("niah_multiquery", "dense"), ("4K", "500", "100.0", "100.0%", "-12.5±10.3", "100±12", "0.123±0.045")),
    ]:
        assert any(line.split() == [*words, *cells] or line.split()[-len(cells) :] == list(cells) for line in shown)
    scores = next(line.split() for line in shown if line.startswith("RULER (13)"))
    assert scores.count("100.0") == len(lengths) + 1


def test_fidelity_fits():
    methods = ["stem-official", "stem-default", "flashprefill", "oracle"]
    layer = {"layer": 0, "error": 0.1639, "recall": 0.819, "error_by_position": [0.1] * 8}
    run = {
        "density": 0.12, "kl_nats": 10.12635, "top1_agreement": 1.0, "dense_nll": 6.9, "sparse_nll": 7.0,
        "kl_by_position": [0.1] * 8,
    }  # fmt: skip
    places = [{"prompt": 0, "method": method, "target": target} for method in methods for target in (0.12, None)]
    record = {
        "settings": {"densities": [0.12]}, "methods": methods, "layers": [place | layer for place in places],
        "propagated": [place | run for place in places],
        "unreachable": [{"method": "uniform", "target": 0.12, "reason": "layer 0: " + "it keeps more. " * 20}],
    }  # fmt: skip
    for columns in (100, 160):
        shown = lines(fidelity.render(record, "some/folder/fidelity.md"), columns)
        assert max(map(len, shown)) <= 100
        rows = [line.split() for line in shown if line.startswith("flashprefill")]
        numbers = ["0.1200", "0.1639", "0.8190", "10.12635", "100.00%", "992.275", "+104.3584"]
        assert rows == [["flashprefill", *numbers, "1.000", "1.000"], ["flashprefill", *numbers, "-", "-"]]
        assert any("uniform at 0.12 is left out: layer 0: it keeps more." in line for line in shown)


def test_a_long_name_folds():
    shown = lines(tasks.render(answers([4096], ("dense", "stem-official value_term=none decay=1.0 rows=0%-50%"))), 160)
    assert max(map(len, shown)) <= 100
