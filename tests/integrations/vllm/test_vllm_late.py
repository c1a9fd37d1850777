"""Sums are read late: without a GPU its copies and events are made up."""

import pytest
import torch

from stem_attn.integrations.vllm import late
from stem_attn.integrations.vllm.late import Late

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Event:
    def __init__(self):
        self.over = False

    def query(self):
        return self.over


@pytest.fixture
def events(monkeypatch):
    """The copies that were begun."""
    begun = []

    def to_host(sums, count):
        begun.append(Event())
        return sums.clone(), count, begun[-1]

    monkeypatch.setattr(late, "_to_host", to_host)
    return begun


def test_a_sum_arrives_when_its_copy_has(events):
    total, late = torch.tensor([5]), Late()
    assert late.read(total, 10) is None  # the copy begins
    total += 3
    assert late.read(total, 14) is None  # it is under way
    events[0].over = True
    assert late.read(total, 14) == (torch.tensor([5]), 10)  # and the next one begins
    events[1].over = True
    assert late.read(total, 14) == (torch.tensor([3]), 4)
    assert late.read(total, 14) is None
    assert len(events) == 2  # nothing new: nothing copied


def test_rows_that_come_later_count_from_nothing(events):
    late = Late()
    late.read(torch.tensor([[1.0, 2.0]]), 1)
    events[0].over = True
    late.read(torch.tensor([[1.5, 2.0], [7.0, 8.0]]), 2)
    events[1].over = True
    sums, count = late.read(torch.tensor([[1.5, 2.0], [7.0, 8.0]]), 2)
    assert sums.tolist() == [[0.5, 0.0], [7.0, 8.0]]
    assert count == 1


@needs_gpu
def test_a_gpus_sum_arrives():
    total, late = torch.tensor([5], device="cuda"), Late()
    assert late.read(total, 10) is None
    torch.cuda.synchronize()
    assert late.read(total, 10) == (torch.tensor([5]), 10)
