"""The picture of drift and agreement by density."""

import pytest

from stem_attn.lab.tasks.plot import draw, lines_of

STEM = {"density": None, "block_size": 128}
METHODS = [
    {"name": "dense", "base": "dense", "fields": {}},
    {"name": "d12", "base": "stem-default", "fields": {**STEM, "budget_scale": 0.4}},
    {"name": "d25", "base": "stem-default", "fields": {**STEM, "budget_scale": 0.9}},
    {"name": "all", "base": "stem-default", "fields": {**STEM, "budget_scale": 1.0, "budget_ratio": 1.0}},
    {"name": "xattention at 0.12", "base": "xattention", "fields": {"density": 0.12, "stride": 8}},
    {"name": "xattention at 0.25", "base": "xattention", "fields": {"density": 0.25, "stride": 8}},
    {"name": "xattention+tail", "base": "xattention", "fields": {"density": 0.25, "at": 1, "method": {"stride": 8}}},
]


def test_a_line_holds_what_differs_in_its_density_only():
    assert lines_of(METHODS) == {
        "stem-default": {"d12", "d25"},
        "all": {"all"},
        "xattention": {"xattention at 0.12", "xattention at 0.25"},
        "xattention+tail": {"xattention+tail"},
    }


def row(family, method, budget, drift):
    estimate = {"mean": drift, "standard_error": 0.1, "interval": [drift - 0.2, drift + 0.2]}
    single = {"mean": 50.0, "standard_error": None, "interval": None}
    return {
        "family": family, "method": method, "tasks": 2, "budget": budget, "drift": estimate, "agreement": single,
    }  # fmt: skip


@pytest.mark.parametrize("families", [[], ["RULER"], ["RULER", "code"]])
def test_a_picture_has_a_column_a_family(families):
    rows = [row(family, name, 0.2, 0.1) for family in families for name in ("d12", "d25", "xattention+tail")]
    dense = [{**row(family, "dense", 1.0, 0.0), "drift": None, "agreement": None} for family in families]
    image = draw({"settings": {"methods": METHODS}, "means": [*dense, *rows], "model": "some", "seed": 1})
    assert image.startswith(b"\x89PNG")
    width = int.from_bytes(image[16:20], "big")
    assert width == pytest.approx(4.6 * max(len(families), 1) * 110, abs=2)
