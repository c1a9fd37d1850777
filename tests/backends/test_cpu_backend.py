"""The CPU backend against masked dense attention in float64, written here from the public definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import make_qkv
from stem_attn import BlockSelection, block_sparse_attention
from stem_attn.backends.cpu import gathered
from stem_attn.blocks import BlockGrid

pytestmark = pytest.mark.usefixtures("way")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_selection(
    q_len: int, k_len: int, size: int, *, batch: int = 1, heads: int = 4, per_head: bool = False, seed: int = 1
) -> BlockSelection:
    """Keep random blocks and the diagonal one: about a third, or another share in each head and batch row."""
    gen = torch.Generator().manual_seed(seed)
    grid = BlockGrid(q_len, k_len, size)
    share = torch.rand(batch, heads, 1, 1, generator=gen) if per_head else 0.33
    columns = torch.arange(grid.k_blocks)
    diagonal = grid.block_ids()[:, None]
    mask = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < share
    mask = (mask & (columns < diagonal)) | (columns == diagonal)
    return BlockSelection.from_mask(mask, block_size=size, q_len=q_len, k_len=k_len)


def token_mask(selection: BlockSelection, window: int | None = None) -> Tensor:
    """Visible pairs, bool [B, Hq, Tq, Tk]."""
    i = torch.arange(selection.q_len)[:, None] + selection.k_len - selection.q_len
    j = torch.arange(selection.k_len)
    row = i // selection.block_size - (selection.k_len - selection.q_len) // selection.block_size
    kept = selection.to_mask()[:, :, row, j // selection.block_size]
    return kept & (j <= i) & (j > i - (window or selection.k_len))


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
    logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def check(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, window: int | None = None, scale: float | None = None
) -> None:
    """Compare with float64: at most twice the max and RMS error of dense SDPA on the same inputs and mask."""
    mask = token_mask(selection, window)
    expected, expected_lse = exact(q, k, v, mask, scale)
    out, lse = block_sparse_attention(q, k, v, selection, window=window, scale=scale, return_lse=True, backend="cpu")
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    group = q.shape[1] // k.shape[1]
    dense = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask, scale=scale
    )
    error, budget = (out - expected).abs(), (dense - expected).abs()
    floor = 4e-7 if q.dtype != torch.float64 else 1e-15  # a handful of tokens may come out exact by chance
    assert error.max() <= 2 * budget.max() + floor
    assert error.square().mean().sqrt() <= 2 * budget.square().mean().sqrt() + floor / 4
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("length", [1, 63, 111, 129, 1000])
def test_odd_lengths(length, dtype):
    q, k, v = make_qkv(length, dtype=dtype)
    check(q, k, v, random_selection(length, length, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_a_real_model_stay_in_the_error_budget(dtype):
    q, k, v = make_qkv(700, dim=64, dtype=dtype)
    check(q * 3, k, v, random_selection(700, 700, 64))  # logits of standard deviation 3


@pytest.mark.parametrize("size", [16, 48, 128])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 200), (75, 210), (100, 356), (130, 131)])
def test_a_prefix_may_end_inside_a_block(q_len, k_len, size):
    q, k, v = make_qkv(q_len, k_len)
    check(q, k, v, random_selection(q_len, k_len, size))


@pytest.mark.parametrize("way", ["torch"], indirect=True)
@pytest.mark.parametrize("job_logits", [1, 3000, 2**20])
def test_counts_may_differ_by_head_and_batch_row(monkeypatch, job_logits):
    monkeypatch.setattr(gathered, "_JOB_LOGITS", job_logits)
    q, k, v = make_qkv(333, 400, batch=3, heads=6)
    selection = random_selection(333, 400, 16, batch=3, heads=6, per_head=True)
    assert selection.counts.unique().numel() > 10
    check(q, k, v, selection)


@pytest.mark.parametrize("way", ["torch"], indirect=True)
def test_jobs_hold_every_task_once_and_bound_their_logits():
    selection = random_selection(333, 400, 16, batch=3, heads=6, per_head=True)
    plan = gathered._make_jobs(selection, 2)
    tasks = [(job.sample, i) for job in plan.jobs for i in range(job.tasks.start, job.tasks.stop)]
    assert sorted(i for _, i in tasks) == list(range(selection.counts.numel()))
    assert plan.blocks.numel() == selection.counts.sum()
    for job in plan.jobs:
        n = job.tasks.stop - job.tasks.start
        assert n * job.width * 16 * 16 <= gathered._JOB_LOGITS or n == 1


def test_indices_may_be_wider_than_the_counts_and_expanded():
    q, k, v = make_qkv(200, batch=2)
    one = random_selection(200, 200, 16, heads=1)
    wide = F.pad(one.indices, (0, 7), value=-1).expand(2, 4, -1, -1)
    check(q, k, v, BlockSelection(wide, one.counts.expand(2, 4, -1), 16, 200, 200))


@pytest.mark.parametrize("window", [1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("per_head", [False, True])
def test_window_cuts_inside_kept_blocks(window, per_head):
    q, k, v = make_qkv(150, 210)
    check(q, k, v, random_selection(150, 210, 16, per_head=per_head), window=window)


@pytest.mark.parametrize("window", [1, 16, 50])
def test_band(window):
    q, k, v = make_qkv(75, 210)
    band = BlockSelection.band(batch=1, heads=4, window=window, block_size=16, q_len=75, k_len=210, device="cpu")
    check(q, k, v, band, window=window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("v_dim", [16, 80])
def test_head_groups_and_value_dims(heads, kv_heads, v_dim):
    q, k, v = make_qkv(200, batch=2, heads=heads, kv_heads=kv_heads, v_dim=v_dim)
    check(q, k, v, random_selection(200, 200, 32, batch=2, heads=heads), scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_the_inputs_do_not_matter(dtype):
    q, k, v = make_qkv(150, 190, batch=2, dtype=dtype)
    selection = random_selection(150, 190, 32, batch=2)
    expected = block_sparse_attention(q, k, v, selection, backend="cpu")
    for swap in ((1, 2), (2, 3), (0, 3)):
        strided = [x.transpose(*swap).contiguous().transpose(*swap) for x in (q, k, v)]
        assert torch.equal(block_sparse_attention(*strided, selection, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [128, 333])
def test_everything_kept_is_dense_attention(dtype, length):
    q, k, v = make_qkv(length, dtype=dtype)
    grid = BlockGrid(length, length, 32)
    causal = torch.ones(1, 4, grid.q_blocks, grid.k_blocks, dtype=torch.bool).tril()
    selection = BlockSelection.from_mask(causal, block_size=32, q_len=length, k_len=length)
    check(q, k, v, selection)  # against float64: the mask is the plain causal one


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize(("q_len", "k_len", "v_dim"), [(111, 111, 32), (150, 333, 32), (333, 333, 24)])
@pytest.mark.parametrize("way", ["torch"], indirect=True)
def test_bfloat16_as_any_cpu_computes_it(monkeypatch, products, q_len, k_len, v_dim, window):
    """What CPUs with bfloat16 instructions run; it is right, if slow, on any."""
    monkeypatch.setattr(gathered, "multiplies_bfloat16", lambda dtype, device: products)
    q, k, v = make_qkv(q_len, k_len, batch=2, v_dim=v_dim, dtype=torch.bfloat16)
    selection = random_selection(q_len, k_len, 32, batch=2, per_head=True)
    out = block_sparse_attention(q, k, v, selection, window=window, backend="cpu")
    mask = token_mask(selection, window)
    expected, _ = exact(q, k, v, mask)
    dense = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask)
    error, budget = (out - expected).abs(), (dense - expected).abs()
    assert error.max() <= 2 * budget.max()
    assert error.square().mean().sqrt() <= 2 * budget.square().mean().sqrt()


@pytest.mark.parametrize("length", [100, 128])
def test_reads_no_uninitialised_memory_and_nothing_behind_the_keys(way, monkeypatch, length):
    """Poison fresh memory, and the rest of a static cache that k and v are cut from, with NaN."""
    q, k, v = make_qkv(60, length, dtype=torch.bfloat16)
    selection = random_selection(60, length, 32, per_head=True)
    expected, expected_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="cpu")
    cached = [F.pad(x, (0, 0, 0, 200 - length), value=torch.nan)[:, :, :length] for x in (k, v)]
    poisoned = 0

    def poison(make):
        def made(*args, **kwargs):
            nonlocal poisoned
            poisoned += 1
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    out, lse = block_sparse_attention(q, *cached, selection, return_lse=True, backend="cpu")
    assert poisoned >= (4 if way == "torch" else 2)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_an_unselected_block_has_no_effect():
    q, k, v = make_qkv(160)
    selection = random_selection(160, 160, 16)
    expected = block_sparse_attention(q, k, v, selection, backend="cpu")
    mask = selection.to_mask()
    unused = [j for j in range(10) if not mask[0, :2, :, j].any(0)[j + 1 :].any()]
    assert unused, "the seed leaves no block that only its own rows read"
    block = unused[0]
    k[:, 0, block * 16 : block * 16 + 16] += 1
    out = block_sparse_attention(q, k, v, selection, backend="cpu")
    others = torch.arange(160) // 16 != block
    assert torch.equal(out[:, :2, others], expected[:, :2, others])
    assert not torch.equal(out, expected)
