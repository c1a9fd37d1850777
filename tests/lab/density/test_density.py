import json

import pytest
import torch

from stem_attn import cli
from stem_attn.lab.density import run
from stem_attn.lab.shapes import SHAPES, Shape


@pytest.fixture
def fast(monkeypatch):
    """A smaller layer: the command's own has 32 heads of 128."""
    monkeypatch.setitem(SHAPES, "llama3-8b", Shape(2, 1, 32))


def test_presets_are_brought_to_the_density_and_compared_with_the_first(fast, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = ["--lengths", "8192", "--densities", "0.3", "--rounds", "1", "--device", "cpu", "--out", str(out)]
    assert cli.run(["density", "--presets", "official,default", *arguments]) == 0
    found = json.loads((out / "equal_density.json").read_text())
    assert found["command"] == "density"
    assert found["settings"] == {
        "lengths": [8192], "densities": [0.3], "presets": ["official", "default"], "rounds": 1
    }  # fmt: skip
    first, second = found["records"]
    assert (first["preset"], second["preset"]) == ("official", "default")
    for record in (first, second):
        assert record["density"] == pytest.approx(0.3, abs=0.03)
        assert all(0 < t["min"] <= t["median"] <= t["max"] for t in record["ms"].values())
    assert first["whole_over_first"] == 1
    assert second["whole_over_first"] == second["ms"]["whole"]["median"] / first["ms"]["whole"]["median"]
    assert f"{second['whole_over_first']:.3f}" in capsys.readouterr().out


def test_a_length_that_cannot_have_the_density_is_one_sentence(fast, tmp_path, capsys):
    arguments = ["--lengths", "100", "--densities", "0.12", "--rounds", "1", "--device", "cpu"]
    assert cli.run(["density", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stem-attn: error: preset official at 100 tokens: ")
    assert error.endswith("; take longer prompts")
    assert list(tmp_path.iterdir()) == []


def test_inputs_follow_the_seed_and_heads_differ_in_sharpness(fast):
    q, k, v = run.draw_inputs(200, torch.device("cpu"), seed=3)
    again = run.draw_inputs(200, torch.device("cpu"), seed=3)
    assert all(torch.equal(one, other) for one, other in zip((q, k, v), again, strict=True))
    spread = q.float().std(dim=(0, 2, 3))
    assert spread.max() > 4 * spread.min()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--presets", "official,nice"], "--presets: unknown nice; known: default, default-0.1, official, paper"),
        (["--presets", ","], "--presets: unknown (none)"),
        (["--lengths", "8k"], "--lengths takes positive whole numbers"),
        (["--densities", "0"], "--densities takes numbers above 0"),
        (["--device", "toaster"], "cannot use device 'toaster'"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, said, tmp_path, capsys):
    assert cli.run(["density", "--out", str(tmp_path), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
