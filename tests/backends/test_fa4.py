"""The FA4 backend: its block lists anywhere, its kernel where flash-attn-4 and a Hopper GPU are."""

import pytest
import torch

from helpers import make_qkv
from stem_attn import BlockSelection, PrefillPolicy, StemConfig
from stem_attn.backends.base import Geometry
from stem_attn.backends.fa4 import BLOCK, Fa4Backend, block_lists
from stem_attn.blocks import BlockGrid
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention

BACKEND = Fa4Backend()
needs_fa4 = pytest.mark.skipif(BACKEND.why_unavailable() is not None, reason=str(BACKEND.why_unavailable()))


def random_selection(q_len: int, k_len: int, *, batch: int = 1, heads: int = 4) -> BlockSelection:
    """Keep the diagonal blocks and about half of the others."""
    gen = torch.Generator().manual_seed(1)
    grid = BlockGrid(q_len, k_len, BLOCK)
    columns = torch.arange(grid.k_blocks)
    diagonal = grid.block_ids()[:, None]
    mask = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < 0.5
    mask = (mask & (columns < diagonal)) | (columns == diagonal)
    return BlockSelection.from_mask(mask, block_size=BLOCK, q_len=q_len, k_len=k_len)


def test_long_prompts_run_on_it_where_adapters_ask_what_it_gains() -> None:
    grid = BlockGrid(32768, 32768, BLOCK)
    geometry = Geometry("cuda", torch.bfloat16, 128, 0)
    assert PrefillPolicy().why_dense(StemConfig(), [(32768, grid)], None, BACKEND, geometry) is None
    short = BlockGrid(4096, 4096, BLOCK)
    assert PrefillPolicy().why_dense(StemConfig(), [(4096, short)], None, BACKEND, geometry) == "no gain from sparsity"


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (700, 700), (300, 300 + 3 * BLOCK)])
def test_lists_hold_each_kept_block_once(q_len: int, k_len: int) -> None:
    selection = random_selection(q_len, k_len, batch=2)
    # Past a row's count may stand anything, and the array may be wider than the sequence has blocks.
    wide = torch.nn.functional.pad(selection.indices, (0, 9), value=1 << 30)
    selection = BlockSelection.made(wide, selection.counts, selection.grid)
    lists = block_lists(selection)
    grid = selection.grid
    held = torch.zeros(2, 4, grid.q_blocks, grid.k_blocks, dtype=torch.int)
    for kind in ("mask", "full"):
        counts = lists[f"{kind}_block_cnt"].expand(2, 4, -1)
        indices = lists[f"{kind}_block_idx"]
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.shape[-1] <= grid.k_blocks
        indices = indices.expand(2, 4, -1, -1)
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            for j in indices[b, h, row, : counts[b, h, row]].tolist():
                held[b, h, row, j] += 1
                assert (j == grid.first_block + row) == (kind == "mask")
    kept = BlockSelection.made(wide.where(wide < grid.k_blocks, -1), selection.counts, grid).to_mask()
    assert torch.equal(held, kept.int())


def test_tensors_on_the_cpu_are_refused() -> None:
    q, k, v = make_qkv(256, dim=64, dtype=torch.float16)
    assert "Hopper" in str(BACKEND.why_unsupported(Call(Layout.dense(q, k, v), BLOCK, 0.125)))


@needs_fa4
def test_refusals_say_what_was_expected() -> None:
    def why(
        q_len: int = 256,
        dtype: torch.dtype = torch.float16,
        dim: int = 64,
        size: int = BLOCK,
        window: int | None = None,
    ) -> str | None:
        q, k, v = (x.cuda() for x in make_qkv(q_len, 512, dim=dim, dtype=dtype))
        return BACKEND.why_unsupported(Call(Layout.dense(q, k, v), size, 0.125, window))

    assert why() is None
    assert "float32" in str(why(dtype=torch.float32))
    assert "320" in str(why(dim=320))
    assert "64" in str(why(size=64))
    assert "window" in str(why(window=100))
    assert "prefix" in str(why(q_len=250))


@needs_fa4
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("q_len", "k_len", "dim"), [(63, 63, 64), (1000, 1000, 128), (300, 300 + 3 * BLOCK, 96)])
def test_matches_float64(q_len: int, k_len: int, dim: int, dtype: torch.dtype) -> None:
    """At most twice the error of dense SDPA in the same dtype, over the same pairs."""
    q, k, v = (x.cuda() for x in make_qkv(q_len, k_len, batch=2, dim=dim, dtype=dtype))
    selection = random_selection(q_len, k_len, batch=2)
    on_gpu = BlockSelection(selection.indices.cuda(), selection.counts.cuda(), BLOCK, q_len, k_len)
    call = Call(Layout.dense(q, k, v), BLOCK, 0.1)
    out, lse = call.new_output(), call.new_lse()
    BACKEND.attend(call, [on_gpu], out, lse)
    exact, exact_lse = reference_attention(q.cpu(), k.cpu(), v.cpu(), selection.to_mask(), BLOCK, scale=0.1)
    i = torch.arange(q_len)[:, None] + k_len - q_len
    j = torch.arange(k_len)
    seen = selection.to_mask()[:, :, i // BLOCK - selection.grid.first_block, j // BLOCK] & (j <= i)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, *(x.repeat_interleave(2, 1) for x in (k, v)), attn_mask=seen.cuda(), scale=0.1
    )
    error, dense_error = out.double().cpu() - exact, dense.double().cpu() - exact
    assert error.abs().max() <= 2 * dense_error.abs().max()
    assert error.pow(2).mean() <= 4 * dense_error.pow(2).mean()
    torch.testing.assert_close(lse.double().cpu(), exact_lse, atol=2e-3, rtol=1e-3)


def test_every_sequence_of_a_packed_call_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sequence has a prefix that is no whole number of blocks."""
    q, k, v = (torch.zeros(n, 2, 64, dtype=torch.float16) for n in (328, 328 + 100, 328 + 100))
    call = Call(Layout.packed(q, k, v, [0, 128, 328], [0, 128, 428]), BLOCK, 0.125)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert "prefix must be a multiple of 128 tokens, got 100" in str(BACKEND.why_unsupported(call))
