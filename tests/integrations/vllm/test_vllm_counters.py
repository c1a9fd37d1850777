"""Kept blocks are added up."""

import pytest
import torch

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.integrations.vllm.counters import Counters

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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
    assert counters.read()["selections"] == 10
    counters.reset()
    assert counters.read()["selections"] == 0
    assert counters.read()["density"] is None
