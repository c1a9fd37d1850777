"""Numbers that are not finite, or overflow, harm what they must and nothing else."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from helpers import SMALL, make_qkv
from stem_attn import BlockSelection, StemConfig, stem_attention
from stem_attn.backends.cpu import gathered
from stem_attn.blocks import BlockGrid
from stem_attn.selection import select_top_blocks

pytestmark = pytest.mark.usefixtures("way")

Q_LEN, K_LEN, TOKEN = 260, 300, 173  # the token is counted from the first key


def configs():
    for score, term, scope, forced in itertools.product(
        ("linear", "mass"), ("none", "log", "zscore"), ("head", "group", "layer"), ("inside", "on_top")
    ):
        yield dataclasses.replace(SMALL, score=score, value_term=term, budget_scope=scope, forced_blocks=forced)


def spoil(clean: tuple[Tensor, ...], where: str, number: float) -> list[Tensor]:
    """Put a number into one token of the second batch row and the second head of q, k or v."""
    dirty = [x.clone() for x in clean]
    dirty["qkv".index(where)][1, 1, TOKEN - (K_LEN - Q_LEN if where == "q" else 0), 3] = number
    return dirty


def assert_valid(selection: BlockSelection, config: StemConfig) -> None:
    """Check what a selection promises, forced blocks among it."""
    grid, counts = selection.grid, selection.counts
    real = torch.arange(selection.indices.shape[-1]) < counts[..., None]
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
    """Where causal attention is finite, bool [B, Hq, Tq]; what a query does not see does not count."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    logits = ((q @ k.mT) * q.shape[3] ** -0.5).masked_fill(~visible, -math.inf)
    unseen_values = ~v.isfinite().all(-1)[:, :, None] & visible
    return logits.softmax(-1).isfinite().all(-1) & ~unseen_values.any(-1)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_one_number_harms_only_what_it_must(where, number):
    clean = make_qkv(Q_LEN, K_LEN, batch=2, heads=4, kv_heads=2)
    dirty = spoil(clean, where, number)
    harmed = [1] if where == "q" else [2, 3]
    others = [head for head in range(4) if head not in harmed]
    may_differ = ~dense_is_finite(*dirty)
    if where == "v":  # queries before it in its block meet it with the weight 0, and 0 x NaN is NaN
        block = TOKEN // 16 * 16
        may_differ[1, harmed, block - (K_LEN - Q_LEN) : TOKEN - (K_LEN - Q_LEN)] = True
    for config in configs():
        expected, expected_kept = stem_attention(*clean, config=config, backend="cpu", return_selection=True)
        out, kept = stem_attention(*dirty, config=config, backend="cpu", return_selection=True)
        assert_valid(kept, config)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(kept.to_mask()[0], expected_kept.to_mask()[0])
        assert out[1, others].isfinite().all()
        assert (out.isfinite().all(-1) | may_differ).all(), config
        if config.budget_scope == "head":
            assert torch.equal(kept.to_mask()[1, others], expected_kept.to_mask()[1, others])


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("way", ["torch"], indirect=True)
def test_one_number_in_bfloat16_as_any_cpu_computes_it(monkeypatch, products, where):
    monkeypatch.setattr(gathered, "multiplies_bfloat16", lambda dtype, device: products)
    one_nan_in(torch.bfloat16, where)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_number_in_half_precision(where, dtype):
    one_nan_in(dtype, where)


def one_nan_in(dtype: torch.dtype, where: str) -> None:
    clean = make_qkv(Q_LEN, K_LEN, batch=2, dtype=dtype)
    dirty = spoil(clean, where, math.nan)
    out = stem_attention(*dirty, config=SMALL, backend="cpu")
    assert torch.equal(out[0], stem_attention(*clean, config=SMALL, backend="cpu")[0])
    finite = dense_is_finite(*dirty)
    if where == "v":
        finite[1, 2:, TOKEN // 16 * 16 - (K_LEN - Q_LEN) : TOKEN - (K_LEN - Q_LEN)] = False
    assert (out.isfinite().all(-1) | ~finite).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_heads_full_of_it_leave_the_others_alone(dtype, number):
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
    config = dataclasses.replace(SMALL, residual="mean")
    out, kept = stem_attention(*spoil(clean, where, math.nan), config=config, backend="cpu", return_selection=True)
    expected = stem_attention(*clean, config=config, backend="cpu")
    assert_valid(kept, config)
    assert torch.equal(out[0], expected[0])
    finite = out[1].isfinite().all(-1)
    if where == "q":
        assert finite.sum() == finite.numel() - 1
        assert not finite[1, TOKEN - (K_LEN - Q_LEN)]
    else:
        assert finite[:, : TOKEN // 16 * 16 - (K_LEN - Q_LEN)].all()


@pytest.mark.parametrize("scope", ["head", "group", "layer"])
@pytest.mark.parametrize("score", ["linear", "mass"])
@pytest.mark.parametrize("way", ["torch"], indirect=True)  # it attends to nothing
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
