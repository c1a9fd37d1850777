"""What a server shows without being asked: the startup table, /metrics, and the dashboard over it."""

import json
import re
from pathlib import Path

import pytest
from engines import SPARSE
from servers import server
from tiny_families import prompt

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana-vllm.json"
STEM = {**SPARSE, "dense_layers": [0], "min_seq_len": 64, "audit_rows": 64, "min_recall": 0.93}  # out of reach


@pytest.fixture(scope="module")
def running(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # Of several API servers vLLM itself collects what all processes count: no environment variable is set here.
    options = {"max_model_len": 2048, "enforce_eager": True, "served_model_name": "tiny", "api_server_count": 2}
    with server(folders("llama"), folder / "log.txt", STEM, **options) as running:
        for length in (700, 33):
            body = {"model": "tiny", "prompt": prompt(length, length), "max_tokens": 4, "temperature": 0}
            running.request("/v1/completions", {**body, "ignore_eos": True})
        yield running


def values(running):
    """Every sample of the metrics page by its name and labels."""
    lines = [line for line in running.request("/metrics").splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_startup_table_is_logged_once(running):
    log = running.log.read_text()
    lines = [line.partition("] ")[2].rstrip() for line in log.splitlines()]
    assert lines.count("stem-attn: what the layers do") == 1
    start = lines.index("stem-attn: what the layers do")
    assert lines[start + 1 : start + 4] == [
        "layers  attention  why",
        "0       dense      dense layer",
        "1       sparse",
    ]


def test_the_counters_stand_on_the_metrics_page(running):
    found = values(running)
    assert found['stem_tokens_total{attention="sparse",reason=""}'] == 700
    assert found['stem_tokens_total{attention="dense",reason="short prompt"}'] == 33
    assert found['stem_tokens_total{attention="dense",reason="dense layer"}'] == 733
    assert found['stem_tokens_total{attention="dense",reason="decode"}'] == 2 * 3 * 2
    assert 0 < found["stem_kept_blocks_total"] < found["stem_causal_blocks_total"]
    assert found["stem_selections_total"] > 0
    assert found["stem_selection_seconds_total"] > 0


def test_audits_stand_on_the_metrics_page_and_in_the_workers_answer(running):
    found = {name: value for name, value in values(running).items() if name.endswith('{layer="1"}')}
    assert found['stem_audit_tokens_total{layer="1"}'] == 700
    assert found['stem_redone_tokens_total{layer="1"}'] == 700
    recall = found['stem_audit_recall_total{layer="1"}'] / 700
    error = (found['stem_audit_lost_power_total{layer="1"}'] / found['stem_audit_power_total{layer="1"}']) ** 0.5
    assert 0.1 < recall < 0.93
    (counts,) = running.stats()
    assert list(counts["audit"]) == ["1"]  # JSON has no other keys
    assert counts["audit"]["1"]["recall"][0] == pytest.approx(recall)
    assert counts["audit"]["1"]["error"][0] == pytest.approx(error)
    assert counts["redone_tokens"] == {"1": 700}


def test_the_dashboard_asks_for_what_there_is(running):
    names = {name.partition("{")[0] for name in values(running)}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"\b(?:stem_|vllm:)\w+", text)}
    assert asked <= names
    assert {name for name in names if name.startswith("stem_") and not name.endswith("_created")} <= asked
