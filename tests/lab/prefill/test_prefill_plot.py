"""`stem-attn prefill --plot`."""

import json

import pytest

import tiny_model
from stem_attn import cli
from stem_attn.lab.prefill import plot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def command(folder, *arguments):
    small = ["--set", "block_size=16", "--set", "min_seq_len=0", "--max-tokens", "400", "--new-tokens", "1"]
    return cli.run(["prefill", "--model", folder, "--device", "cpu", *small, *arguments])


def test_the_plot_is_drawn_from_the_record(folder, tmp_path, monkeypatch):
    drawn = []

    def draw(found):
        drawn.append(found)
        return original(found)

    original = plot.draw
    monkeypatch.setattr(plot, "draw", draw)
    assert command(folder, "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "r.json")) == 0
    image = (tmp_path / "p.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    (found,) = drawn
    assert json.loads(json.dumps(found)) == json.loads((tmp_path / "r.json").read_text())
    slower = found | {"stem": found["stem"] | {"prefill_seconds": 9.0}}
    assert original(found) == image  # nothing but the record goes in
    assert original(slower) != image


def test_nothing_is_run_where_the_plot_cannot_be_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stem_attn.lab.models.load", lambda *args, **kwargs: pytest.fail("it began"))
    assert command(folder, "--plot", str(tmp_path / "missing" / "p.png")) == 2
    assert "missing/p.png: its folder does not exist" in capsys.readouterr().err


def test_nothing_is_run_where_the_plot_and_the_record_have_one_path(folder, tmp_path, capsys):
    assert command(folder, "--plot", str(tmp_path / "p"), "--json", str(tmp_path / "p")) == 2
    assert "two results would go there" in capsys.readouterr().err
