"""Numbers that are not finite, or overflow, harm what they must and nothing else."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from helpers import SMALL, make_qkv
from stem_attn import BlockSelection, StemConfig, stem_attention
from stem_attn.blocks import BlockGrid
from stem_attn.selection import select_top_blocks

Q_LEN, K_LEN, TOKEN = 260, 300, 133  # the token is counted from the first key


def configs():
    for score, term, scope, forced in itertools.product(
        ("linear", "mass"), ("none", "log", "zscore"), ("head", "group", "layer"), ("inside", "on_top")
    ):
        yield dataclasses.replace(SMALL, score=score, value_term=term, budget_scope=scope, forced_blocks=forced)


def assert_valid(selection: BlockSelection, config: StemConfig) -> None:
    """Check what a selection promises, forced blocks among it."""
    grid, counts = selection.grid, selection.counts
    slots = torch.arange(selection.indices.shape[-1])
    real = slots < counts[..., None]
    assert (counts >= 1).all()
    assert (selection.indices[~real] == -1).all()
    rises = selection.indices[..., 1:] > selection.indices[..., :-1]
    assert (rises | ~real[..., 1:]).all()
    last = selection.indices.gather(-1, counts[..., None].long() - 1)[..., 0]
    assert (last == grid.block_ids()).all()
    rows, columns = grid.block_ids()[:, None], torch.arange(grid.k_blocks)
    forced = (columns <= rows) & ((columns < config.sink_blocks) | (columns > rows - config.local_blocks))
    assert (selection.to_mask() | ~forced).all()


def dense_is_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where masked dense attention is finite: bool [B, Hq, Tq]; masked pairs do not count, whatever they hold."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    logits = ((q @ k.mT) * q.shape[3] ** -0.5).masked_fill(~visible, -math.inf)
    good = logits.softmax(-1).isfinite().all(-1)
    bad_values = ~v.isfinite().all(-1)[:, :, None]
    return good & ~(bad_values & visible).any(-1)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_one_number_harms_only_what_it_must(where, number):
    clean = make_qkv(Q_LEN, K_LEN, batch=2, heads=4, kv_heads=2)
    dirty = [x.clone() for x in clean]
    x = dirty["qkv".index(where)]
    x[1, 1, TOKEN - (K_LEN - Q_LEN if where == "q" else 0), 3] = number
    heads = slice(1, 2) if where == "q" else slice(2, 4)
    others = [head for head in range(4) if not heads.start <= head < heads.stop]
    finite = dense_is_finite(*dirty)
    for config in configs():
        expected, expected_kept = stem_attention(*clean, config=config, backend="cpu", return_selection=True)
        out, kept = stem_attention(*dirty, config=config, backend="cpu", return_selection=True)
        assert_valid(kept, config)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(kept.to_mask()[0], expected_kept.to_mask()[0])
        assert out[1, others].isfinite().all()
        if config.budget_scope == "head":
            assert torch.equal(kept.to_mask()[1, others], expected_kept.to_mask()[1, others])
        # In the block of a value that is not finite, queries before it meet it with the weight 0.
        spared = finite.clone()
        if where == "v" and not math.isfinite(number):
            spared[1, heads, TOKEN // 16 * 16 - (K_LEN - Q_LEN) : TOKEN - (K_LEN - Q_LEN)] = False
        assert (out.isfinite().all(-1) | ~spared).all(), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_head_full_of_it_leaves_the_others_alone(dtype, number):
    q, k, v = make_qkv(Q_LEN, K_LEN, batch=2, heads=4, kv_heads=2, dtype=dtype)
    q[1, 0] = number
    k[1, 1] = number
    for config in configs():
        out, kept = stem_attention(q, k, v, config=config, backend="cpu", return_selection=True)
        assert_valid(kept, config)
        assert out[0].isfinite().all()
        assert out[1, 1].isfinite().all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_with_the_means_of_pruned_blocks(where):
    """A block that is not finite, pruned, spoils the rows behind it; those before it keep their numbers."""
    clean = make_qkv(Q_LEN, K_LEN, batch=2)
    dirty = [x.clone() for x in clean]
    dirty["qkv".index(where)][1, 1, TOKEN, 3] = math.nan
    config = dataclasses.replace(SMALL, residual="mean", sink_blocks=1)
    out, kept = stem_attention(*dirty, config=config, backend="cpu", return_selection=True)
    expected = stem_attention(*clean, config=config, backend="cpu")
    assert_valid(kept, config)
    assert torch.equal(out[0], expected[0])
    first = TOKEN // 16 * 16 - (0 if where == "q" else K_LEN - Q_LEN)
    assert out[1, :, :first].isfinite().all()
    if where == "q":
        assert out[1, :, first + 16 + 24 :].isfinite().all()


@pytest.mark.parametrize("scope", ["head", "group", "layer"])
@pytest.mark.parametrize("score", ["linear", "mass"])
def test_nan_ranks_lowest_and_infinity_below_forced_blocks(score, scope):
    grid = BlockGrid(160, 160, 16)
    config = StemConfig(
        block_size=16, score=score, sink_blocks=0, local_blocks=1, budget_scope=scope, head_floor=0.0, tail_blocks=0
    )
    scores = torch.zeros(1, 2, 10, 10)
    scores[0, :, 9] = torch.arange(10.0)
    scores[0, :, 9, 8] = math.nan
    scores[0, :, 9, 2:5] = math.inf
    selection = select_top_blocks(scores, torch.full((10,), 4, dtype=torch.int32), grid, config, 1)
    for head in range(2):
        assert selection.indices[0, head, 9, :4].tolist() == [2, 3, 4, 9]
