import dataclasses

import pytest
import torch

from helpers import SMALL, VECTORS, assert_same_blocks, load_vector, make_qkv, score_rounding
from stem_attn import StemConfig, block_sparse_attention, select_blocks, stem_attention
from stem_attn.blocks import BlockGrid
from stem_attn.budget import block_budget
from stem_attn.reference import reference_scores, reference_stem
from stem_attn.scoring import block_scores
from stem_attn.selection import select_top_blocks


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_official_vectors(path):
    config, t = load_vector(path)
    q, k, v = t["q"], t["k"], t["v"]
    scale = q.shape[3] ** -0.5
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    assert torch.equal(block_budget(config, grid.k_len, grid), t["budget"])
    causal = torch.arange(grid.k_blocks) <= grid.block_ids()[:, None]
    logits = block_scores(q, k, v, config, scale)
    assert (logits - t["block_logits"])[..., causal].abs().max() < 1e-5
    selection = select_blocks(q, k, v, config=config)
    exact = reference_scores(q, k, v, config, scale=scale)
    assert_same_blocks(selection, t["mask"].bool(), exact, score_rounding(q, k, v, config, exact, scale))
    out = block_sparse_attention(q, k, v, selection)
    assert (out - t["out"]).abs().max() < 1e-5


def test_there_are_vectors():
    assert len(VECTORS) == 4


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
@pytest.mark.parametrize("value_term", ["none", "log", "zscore"])
@pytest.mark.parametrize(
    ("q_len", "k_len", "block_size", "stride"),
    [(1, 1, 16, 8), (63, 63, 16, 4), (111, 111, 32, 16), (129, 400, 16, 16), (500, 1000, 64, 8), (1000, 1000, 48, 1)],
)
def test_equals_the_reference(preset, value_term, q_len, k_len, block_size, stride):
    config = StemConfig.preset(
        preset,
        block_size=block_size,
        stride=stride,
        value_term=value_term,
        value_weight=1.0,
        budget_ratio=0.15,
        budget_bias=1,
        budget_floor=2,
        dense_below=0,
        min_seq_len=0,
        sink_blocks=1,
        local_blocks=2,
    )
    q, k, v = make_qkv(q_len, k_len, batch=2, v_dim=24)
    exact = reference_scores(q, k, v, config, scale=0.3)
    _, mask = reference_stem(q, k, v, config, scale=0.3, prompt_len=k_len + 40)
    selection = select_blocks(q, k, v, config=config, scale=0.3, prompt_len=k_len + 40)
    assert_same_blocks(selection, mask, exact, score_rounding(q, k, v, config, exact, 0.3))


@pytest.mark.parametrize("forced_blocks", ["inside", "on_top"])
def test_ties_go_to_the_lower_index(forced_blocks):
    grid = BlockGrid(160, 160, 16)
    config = StemConfig(block_size=16, sink_blocks=0, local_blocks=1, forced_blocks=forced_blocks)
    budget = torch.full((10,), 4, dtype=torch.int32)
    selection = select_top_blocks(torch.zeros(1, 1, 10, 10), budget, grid, config)
    last = selection.indices[0, 0, 9, : selection.counts[0, 0, 9]].tolist()
    assert last == ([0, 1, 2, 9] if forced_blocks == "inside" else [0, 1, 2, 3, 9])


def test_forced_blocks_are_kept_even_beyond_the_budget():
    config = dataclasses.replace(SMALL, sink_blocks=2, local_blocks=3, budget_ratio=0.0, budget_bias=1)
    q, k, v = make_qkv(320)
    mask = select_blocks(q, k, v, config=config).to_mask()
    for row in range(20):
        expected = sorted({j for j in range(row + 1) if j < 2 or j > row - 3})
        assert mask[0, 0, row].nonzero().flatten().tolist() == expected


def test_heads_can_keep_different_numbers_on_top():
    config = StemConfig.preset("official", block_size=16, dense_below=0, budget_bias=2)
    q, k, v = make_qkv(640)
    selection = select_blocks(q, k, v, config=config)
    assert selection.counts.min() < selection.counts[..., -1, :].max() or selection.counts.unique().numel() > 1
    out, again = stem_attention(q, k, v, config=config, return_selection=True)
    expected, mask = reference_stem(q, k, v, config, scale=32**-0.5)
    assert torch.equal(again.to_mask(), mask)
    assert (out - expected).abs().max() < 1e-5


def test_one_prompt_length_a_batch_row():
    q, k, v = make_qkv(300, batch=2)
    together = select_blocks(q, k, v, config=SMALL, prompt_len=[300, 900]).to_mask()
    for row, length in enumerate((300, 900)):
        part = slice(row, row + 1)
        alone = select_blocks(q[part], k[part], v[part], config=SMALL, prompt_len=length).to_mask()
        assert torch.equal(together[part], alone)
    assert not torch.equal(together[0].sum(-1), together[1].sum(-1))
