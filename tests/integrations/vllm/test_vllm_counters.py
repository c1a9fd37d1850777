"""Kept blocks are added up, and read late: without a GPU its copies and events are made up."""

import pytest
import torch

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.integrations.vllm import counters
from stem_attn.integrations.vllm.counters import Counters, Late

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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


@needs_gpu
def test_a_gpus_sum_arrives():
    total, late = torch.tensor(5, device="cuda"), Late()
    assert late.read(total, 10) == (0, 0)
    torch.cuda.synchronize()
    assert late.read(total, 10) == (5, 10)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_kept_blocks_of_many_selections_are_added_up(device):
    pytest.importorskip("prometheus_client")
    counters = Counters()
    grids = [BlockGrid(300, 500, 16), BlockGrid(77, 77, 16), BlockGrid(300, 500, 16)]
    kept = causal = 0
    for step in range(3):
        counters.count_step(10, {}, 0)
        for heads, grid in enumerate(grids, start=1 + step):
            counts = torch.randint(1, 5, (1, heads, grid.q_blocks), dtype=torch.int32)
            counters.count_blocks(counts.to(device), grid.causal_blocks)
            kept, causal = kept + int(counts.sum()), causal + heads * grid.causal_blocks
    everything = BlockSelection.everything(batch=1, heads=3, grid=grids[0], device=device)
    counters.count_blocks(everything.counts, grids[0].causal_blocks)
    kept, causal = kept + 3 * grids[0].causal_blocks, causal + 3 * grids[0].causal_blocks
    assert counters.read()["density"] == kept / causal
    assert counters.read()["density"] == kept / causal  # reading changes nothing
    counters.reset()
    assert counters.read()["density"] is None
