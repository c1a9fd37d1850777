"""Audits of layers' calls are added up, told as plain values, and given to the metrics page."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from stem_attn.audit import AuditSums
from stem_attn.integrations.vllm import audits
from stem_attn.integrations.vllm.audits import Audits
from stem_attn.integrations.vllm.counters import Counters

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
HEADS = 4


def sums(tokens, recall, error, device="cpu", power=1.0):
    """Those of a call whose heads all have a recall and an error, and rows of some power."""
    queries = HEADS * tokens
    values = [recall * queries, 0.1, 0.001, error**2 * queries * power, queries * power, 0.2, 0.002]
    return AuditSums(queries, 64, torch.tensor(values, dtype=torch.float64, device=device))


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """What the metrics hold, by name and layer; of Prometheus's client there is only what they use."""
    held = {}

    class Metric:
        def __init__(self, name, text, labels):
            assert labels == ["layer"]
            self.name = name

        def labels(self, layer):
            return SimpleNamespace(inc=lambda amount: self.inc(layer, amount))

        def inc(self, layer, amount):
            assert not amount < 0
            held[self.name, layer] = held.get((self.name, layer), 0.0) + amount

    monkeypatch.setitem(sys.modules, "prometheus_client", SimpleNamespace(Counter=Metric))
    audits._metrics.cache_clear()
    yield held
    audits._metrics.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
def test_calls_of_a_layer_add_up(device):
    counted, no, yes = Audits(), torch.tensor(False, device=device), torch.tensor(True, device=device)
    calls = [(3, 100, 0.9, no), (0, 100, 0.5, yes), (None, 50, 1.0, no), (0, 300, 0.7, yes), (3, 20, 0.4, no)]
    for layer, tokens, recall, redone in calls:
        counted.add(layer, sums(tokens, recall, 0.3, device), tokens, redone)
    found = counted.read()
    assert found["redone"] == {0: 2}
    assert found["redone_tokens"] == {0: 400}
    assert list(found["audit"]) == [-1, 0, 3]
    both = sums(100, 0.5, 0.3) + sums(300, 0.7, 0.3)
    expected = both.read()
    assert expected.recall.value == pytest.approx(0.65)
    for name in ("recall", "error"):
        estimate = getattr(expected, name)
        assert found["audit"][0][name] == pytest.approx([estimate.value, estimate.low, estimate.high])
    assert found["audit"][0]["rows"] == 128
    assert json.loads(json.dumps(found["audit"][3])) == found["audit"][3]  # plain values
    assert counted.read() == found  # reading changes nothing


@pytest.mark.parametrize("device", DEVICES)
def test_they_reach_the_page_as_sums(device, page):
    counted = Audits()
    for redone in (False, True):
        for layer in (5, 1 + redone):
            counted.add(layer, sums(100, 0.8, 0.5, device), 100, torch.tensor(redone, device=device))
        counted.show()
    if device == "cuda":
        torch.cuda.synchronize()
        counted.show()
        torch.cuda.synchronize()
        counted.show()
    assert {layer for _, layer in page} == {"1", "2", "5"}
    assert page["stem_audit_tokens", "5"] == 200
    assert page["stem_audit_recall", "5"] == pytest.approx(0.8 * 200)
    lost, power = (page[name, "5"] for name in ("stem_audit_lost_power", "stem_audit_power"))
    assert math.sqrt(lost / power) == pytest.approx(0.5)
    assert [page["stem_redone_tokens", layer] for layer in "125"] == [0, 100, 100]


def test_a_gpus_sums_reach_the_page_late(page, monkeypatch):
    """The copies and the device are made up."""
    counted = Audits()
    monkeypatch.setattr(counted, "_late", type("", (), {"read": lambda self, table, count: (table.clone(), count)})())
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    counted.add(2, sums(100, 0.8, 0.5), 100, torch.tensor(False))
    assert page == {}
    counted.show()
    assert page["stem_audit_tokens", "2"] == 100


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_left_out(page, wrong):
    """But for whether it was attended again."""
    counted = Audits()
    counted.add(0, sums(100, 0.5, wrong), 100, torch.tensor(True))
    assert counted.read() == {"audit": {}, "redone": {0: 1}, "redone_tokens": {0: 100}}
    counted.add(0, sums(100, 0.8, 0.5), 100, torch.tensor(False))
    (found,) = counted.read()["audit"].values()
    assert found["recall"][0] == pytest.approx(0.8)
    assert page["stem_audit_recall", "0"] / page["stem_audit_tokens", "0"] == pytest.approx(0.8)
    assert page["stem_audit_lost_power", "0"] / page["stem_audit_power", "0"] == pytest.approx(0.25)
    assert page["stem_redone_tokens", "0"] == 100


def test_of_huge_outputs_the_error_has_no_interval(page):
    counted = Audits()
    counted.add(0, sums(100, 0.8, 0.5, power=1e82), 100, torch.tensor(False))
    assert counted.read()["audit"][0]["error"] == [pytest.approx(0.5), None, None]
    json.dumps(counted.read(), allow_nan=False)


def test_layers_that_come_after_a_copy_was_begun(page, monkeypatch):
    """Through the counters, as a step does; the device and its events are made up."""
    from stem_attn.integrations.vllm import counters as module
    from stem_attn.integrations.vllm import late

    monkeypatch.setattr(module, "_metrics", lambda: None)
    monkeypatch.setattr(module.Counters, "_add_up", lambda self: None)
    over = SimpleNamespace(query=lambda: True)
    monkeypatch.setattr(late, "_to_host", lambda sums, count: (sums.clone(), count, over))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    counters = Counters()
    for layers in ((5, 1), (5, 2), (), ()):
        for layer in layers:
            counters.audits.add(layer, sums(100, 0.8, 0.5), 100, torch.tensor(layer == 2))
        counters.count_step(0, {}, 0)
    assert {layer: page["stem_audit_tokens", layer] for layer in "125"} == {"1": 100, "2": 100, "5": 200}
    assert page["stem_redone_tokens", "2"] == 100


def test_seeds_differ_and_are_the_same_after_a_reset():
    counters, first = Counters(), []
    for _ in range(2):
        first.append([counters.audits.next_seed() for _ in range(3)])
        counters.reset()
    assert first[0] == first[1]
    assert len(set(first[0])) == 3


def test_a_reset_forgets_them():
    counters = Counters()
    counters.audits.add(0, sums(100, 0.8, 0.5), 100, torch.tensor(True))
    assert counters.read()["audit"]
    counters.reset()
    assert {name: counters.read()[name] for name in ("audit", "redone", "redone_tokens")} == {
        "audit": {},
        "redone": {},
        "redone_tokens": {},
    }
