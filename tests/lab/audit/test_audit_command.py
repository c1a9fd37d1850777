"""`stem-attn eval audit` on a tiny model."""

import json

import pytest

import tiny_model
from stem_attn import cli

SETTINGS = ["--set", "block_size=16", "--set", "min_seq_len=0", "--set", "budget_ratio=0.1", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def test_it_compares_audits_with_the_truth_and_times_prefills(folder, tmp_path, capsys):
    out = tmp_path / "audit.json"
    command = ["eval", "audit", "--model", folder, "--length", "640", "--prompts", "2", "--draws", "5", "--rounds", "2"]
    assert cli.run([*command, *SETTINGS, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    layers = found["layers"]
    assert {row["prompt"] for row in layers} == {0, 1}
    for row in layers:
        assert 0 < row["density"] < 1
        assert 0 < row["recall"]["true"] < 1
        assert row["recall"]["mean"] == pytest.approx(row["recall"]["true"], abs=row["recall"]["half_width"])
        assert row["error"]["true"] > 0
    assert found["summary"]["recall"]["held"] >= 0.9
    assert found["summary"]["recall"]["half_width"] == max(row["recall"]["half_width"] for row in layers)
    assert set(found["times"]["ms"]) == {"dense", "sparse", "audited", "audited with a target"}
    assert found["times"]["audited over sparse"]["median"] > 0
    heads = layers[0]["rows"] / (2 * (640 // 128))
    assert found["work_share"] == pytest.approx(2 * layers[0]["rows"] / (heads * 640))
    assert "of the 95% intervals hold the truth" in capsys.readouterr().out


def test_no_rows_are_refused(folder, capsys):
    assert cli.run(["eval", "audit", "--model", folder, "--set", "audit_rows=0"]) == 2
    assert "--set audit_rows=0 audits nothing" in capsys.readouterr().err
