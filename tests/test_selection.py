import dataclasses

import pytest
import torch

from helpers import SMALL, VECTORS, assert_same_blocks, load_vector, make_qkv, score_rounding
from stem_attn import BlockSelection, StemConfig, block_sparse_attention, select_blocks, stem_attention
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.reference import reference_scores, reference_stem
from stem_attn.scoring import block_scores
from stem_attn.selection import select_top_blocks


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_official_vectors(path):
    config, t = load_vector(path)
    q, k, v = t["q"], t["k"], t["v"]
    scale = q.shape[3] ** -0.5
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    assert torch.equal(budget_of(config, (grid.k_len,)).rows(grid), t["budget"])
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
        sink_blocks=1,
        local_blocks=2,
    )
    q, k, v = make_qkv(q_len, k_len, batch=2, v_dim=24)
    exact = reference_scores(q, k, v, config, scale=0.3)
    _, mask = reference_stem(q, k, v, config, scale=0.3, prompt_len=k_len + 40)
    selection = select_blocks(q, k, v, config=config, scale=0.3, prompt_len=k_len + 40)
    assert_same_blocks(selection, mask, exact, score_rounding(q, k, v, config, exact, 0.3))


@pytest.mark.parametrize("forced_blocks", ["inside", "on_top"])
@pytest.mark.parametrize("scope", ["head", "group", "layer"])
@pytest.mark.parametrize("score", ["linear", "mass"])
@pytest.mark.parametrize(
    ("q_len", "k_len", "block_size", "stride"),
    [(1, 1, 16, 8), (63, 63, 16, 4), (129, 403, 16, 16), (500, 1001, 64, 8), (301, 301, 48, 16)],
)
def test_shared_budgets_and_mass_equal_the_reference(score, scope, forced_blocks, q_len, k_len, block_size, stride):
    config = StemConfig(
        block_size=block_size,
        score=score,
        stride=stride,
        value_weight=0.5,
        budget_ratio=0.2,
        budget_bias=1,
        tail_ratio=1.0,  # a full row, so that the bound on the width is reached
        budget_scope=scope,
        head_floor=0.6,
        forced_blocks=forced_blocks,
    )
    q, k, v = make_qkv(q_len, k_len, heads=4, kv_heads=2, dim=31 if q_len == 63 else 32, v_dim=24)
    q = q * torch.linspace(0.2, 3, 4)[:, None, None]  # heads from diffuse to concentrated
    exact = reference_scores(q, k, v, config, scale=0.3)
    _, mask = reference_stem(q, k, v, config, scale=0.3)
    selection = select_blocks(q, k, v, config=config, scale=0.3)
    assert_same_blocks(selection, mask, exact, score_rounding(q, k, v, config, exact, 0.3))
    assert torch.equal(
        selection.indices, BlockSelection.from_mask(mask, block_size=block_size, q_len=q_len, k_len=k_len).indices
    )


@pytest.mark.parametrize("forced_blocks", ["inside", "on_top"])
@pytest.mark.parametrize(("scope", "scopes"), [("group", 2), ("layer", 1)])
def test_a_shared_budget_costs_what_own_ones_do(scope, scopes, forced_blocks):
    config = dataclasses.replace(SMALL, budget_scope=scope, head_floor=0.5, forced_blocks=forced_blocks)
    q, k, v = make_qkv(500, batch=2, heads=6, kv_heads=2)
    q = q * torch.linspace(0.2, 3, 6)[:, None, None]
    shared = select_blocks(q, k, v, config=config)
    alone = select_blocks(q, k, v, config=dataclasses.replace(config, budget_scope="head"))
    assert not torch.equal(shared.counts, alone.counts)
    sums = [counts.unflatten(1, (scopes, -1)).sum(2) for counts in (shared.counts, alone.counts)]
    assert torch.equal(*sums)
    forced = config.sink_blocks + config.local_blocks
    budget = budget_of(config, (500,)).rows(alone.grid)
    least = (budget * 0.5).int().clamp(min=forced).minimum(alone.grid.block_ids() + 1)
    assert (shared.counts >= least).all()
    rows = alone.grid.block_ids()[:, None]
    columns = torch.arange(alone.grid.k_blocks)
    always = (columns <= rows) & ((columns < config.sink_blocks) | (columns > rows - config.local_blocks))
    assert (shared.to_mask() | ~always).all()


@pytest.mark.parametrize("scope", ["group", "layer"])
def test_tied_heads_share_evenly_no_more_than_they_must(scope):
    grid = BlockGrid(160, 160, 16)
    config = StemConfig(
        block_size=16, score="mass", sink_blocks=0, local_blocks=1, budget_scope=scope, head_floor=0.5, tail_blocks=0
    )
    budget = torch.full((10,), 4, dtype=torch.int32)
    selection = select_top_blocks(torch.zeros(1, 2, 10, 10), budget, grid, config, 1)
    # Each head keeps its diagonal block and its first; the four left over go to the lower head's lowest.
    assert selection.indices[0, 0, 9].tolist() == [0, 1, 2, 3, 4, 9]
    assert selection.indices[0, 1, 9].tolist() == [0, 9, -1, -1, -1, -1]


def test_mass_finds_a_block_that_one_group_of_queries_needs():
    """The largest share counts, not the mean: fifteen groups give half of their attention to block 3, one all to 6."""
    config = dataclasses.replace(SMALL, score="mass", stride=1, value_term="none", budget_bias=2, decay=1.0)
    q, k, v = torch.zeros(1, 1, 320, 32), torch.zeros(1, 1, 320, 32), torch.zeros(1, 1, 320, 32)
    k[:, :, 48:64, 1] = 16.6
    q[..., 1] = 1.0
    k[:, :, 100, 0] = 30.0
    q[:, :, 310] = 0.0
    q[:, :, 310, 0] = 30.0
    row = block_scores(q, k, v, config, 32**-0.5)[0, 0, 19]
    assert row.argmax() == 6
    assert row[3].exp() == pytest.approx(0.5, abs=0.01)
    assert 6 in select_blocks(q, k, v, config=config).indices[0, 0, 19].tolist()


@pytest.mark.parametrize("forced_blocks", ["inside", "on_top"])
def test_ties_go_to_the_lower_index(forced_blocks):
    grid = BlockGrid(160, 160, 16)
    config = StemConfig(block_size=16, sink_blocks=0, local_blocks=1, forced_blocks=forced_blocks)
    budget = torch.full((10,), 4, dtype=torch.int32)
    selection = select_top_blocks(torch.zeros(1, 1, 10, 10), budget, grid, config, 1)
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


@pytest.mark.parametrize("value_term", ["log", "zscore", "none"])
def test_double_precision_selects_what_float32_does(value_term):
    q, k, v = make_qkv(300, dtype=torch.float64)
    config = dataclasses.replace(SMALL, value_term=value_term)
    found, expected = (select_blocks(*qkv, config=config) for qkv in ((q, k, v), (q.float(), k.float(), v.float())))
    assert found.density() < 0.6
    assert (found.to_mask() != expected.to_mask()).float().mean() < 1e-3
