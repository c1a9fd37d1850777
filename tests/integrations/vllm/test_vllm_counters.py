"""Sums of a device that are read late: without a GPU its copies and events are made up."""

import pytest
import torch

from stem_attn.integrations.vllm import counters
from stem_attn.integrations.vllm.counters import Late


class Event:
    def __init__(self):
        self.over = False

    def query(self):
        return self.over


def test_a_sum_arrives_when_its_copy_has(monkeypatch):
    events = []

    def to_host(kept, causal):
        events.append(Event())
        return kept.clone(), causal, events[-1]

    monkeypatch.setattr(counters, "_to_host", to_host)
    total, late = torch.tensor(5), Late()
    assert late.read(total, 10) == (0, 0)  # the copy begins
    total += 3
    assert late.read(total, 14) == (0, 0)  # it is under way
    events[0].over = True
    assert late.read(total, 14) == (5, 10)  # and the next one begins
    events[1].over = True
    assert late.read(total, 14) == (3, 4)
    assert late.read(total, 14) == (0, 0)
    assert len(events) == 2  # nothing new: nothing copied


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_sum_arrives():
    total, late = torch.tensor(5, device="cuda"), Late()
    assert late.read(total, 10) == (0, 0)
    torch.cuda.synchronize()
    assert late.read(total, 10) == (5, 10)
