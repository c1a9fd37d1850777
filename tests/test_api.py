"""Properties of the public calls that hold whatever the backend."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from helpers import SMALL, make_qkv
from stem_attn import (
    BlockSelection,
    StemConfig,
    backends,
    block_sparse_attention,
    methods,
    select_blocks,
    stem_attention,
    stem_attention_varlen,
)
from stem_attn.config import field_names
from stem_attn.reference import reference_attention, reference_stem

KEEP_ALL = dataclasses.replace(SMALL, budget_ratio=1.0)


def dense(q, k, v, **kwargs):
    """Lower-right causal SDPA with grouped heads."""
    groups = q.shape[1] // k.shape[1]
    offset = k.shape[2] - q.shape[2]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(offset)
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=mask, **kwargs
    )


@pytest.mark.parametrize(
    ("q_len", "k_len"), [(1, 1), (63, 63), (111, 111), (129, 129), (1000, 1000), (100, 333), (1, 129)]
)
def test_full_budget_is_dense_attention(q_len, k_len):
    q, k, v = make_qkv(q_len, k_len, batch=2, v_dim=24)
    out = stem_attention(q, k, v, config=KEEP_ALL)
    assert out.shape == (2, 4, q_len, 24)
    torch.testing.assert_close(out, dense(q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [111, 129, 1000])
def test_error_is_within_twice_what_dense_attention_loses(dtype, length):
    q, k, v = make_qkv(length, dtype=dtype)
    out, selection = stem_attention(q, k, v, config=SMALL, return_selection=True)
    assert out.dtype == dtype
    exact, _ = reference_attention(q, k, v, selection.to_mask(), 16, scale=32**-0.5)
    dense_loss = dense(q, k, v).double() - dense(q.double(), k.double(), v.double())
    loss = out.double() - exact
    # Rows that keep fewer keys have larger outputs: compare relative to the size of each output.
    size, dense_size = exact.square().mean().sqrt(), dense(q.double(), k.double(), v.double()).square().mean().sqrt()
    assert loss.square().mean().sqrt() / size <= 2 * dense_loss.square().mean().sqrt() / dense_size
    assert loss.abs().max() / exact.abs().max() <= 2 * dense_loss.abs().max() / dense_size


@pytest.mark.parametrize("boundary", [16, 160, 320])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_future_changes_nothing_earlier(boundary, preset):
    config = StemConfig.preset(preset, block_size=16, budget_ratio=0.15, budget_bias=2, budget_floor=2, sink_blocks=1)
    q, k, v = make_qkv(400)
    before, selected = stem_attention(q, k, v, config=config, return_selection=True)
    for x in (q, k, v):
        x[:, :, boundary:] = torch.randn_like(x[:, :, boundary:]) * 5
    after, reselected = stem_attention(q, k, v, config=config, return_selection=True)
    rows = boundary // 16
    assert torch.equal(selected.to_mask()[:, :, :rows], reselected.to_mask()[:, :, :rows])
    assert torch.equal(before[:, :, :boundary], after[:, :, :boundary])
    assert not torch.equal(before[:, :, boundary:], after[:, :, boundary:])


def test_a_batch_is_its_rows():
    q, k, v = make_qkv(333, batch=3)
    together, selection = stem_attention(q, k, v, config=SMALL, return_selection=True)
    for row in range(3):
        part = slice(row, row + 1)
        out, alone = stem_attention(q[part], k[part], v[part], config=SMALL, return_selection=True)
        assert torch.equal(alone.to_mask(), selection.to_mask()[part])
        torch.testing.assert_close(out, together[part], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("chunk", [16, 64, 112])
def test_aligned_chunks_keep_the_blocks_of_one_prefill(preset, chunk):
    config = StemConfig.preset(preset, block_size=16, budget_ratio=0.15, budget_bias=2, budget_floor=2, sink_blocks=1)
    q, k, v = make_qkv(448)
    whole, selection = stem_attention(q, k, v, config=config, return_selection=True)
    mask = selection.to_mask()
    for start in range(0, 448, chunk):
        stop = start + chunk
        out, part = stem_attention(
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            config=config,
            prompt_len=448,
            return_selection=True,
        )
        assert torch.equal(part.to_mask(), mask[:, :, start // 16 : stop // 16, : stop // 16])
        torch.testing.assert_close(out, whole[:, :, start:stop], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("start", "stop"), [(5, 100), (100, 203), (47, 48), (200, 400)])
def test_a_chunk_that_cuts_blocks_keeps_the_budget_and_attends_exactly(start, stop):
    q, k, v = make_qkv(400)
    whole = select_blocks(q, k, v, config=SMALL)
    q_part, k_part, v_part = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
    out, part = stem_attention(q_part, k_part, v_part, config=SMALL, prompt_len=400, return_selection=True)
    first = start // 16
    assert torch.equal(part.counts, whole.counts[:, :, first : first + part.counts.shape[2]])
    exact, _ = reference_attention(q_part, k_part, v_part, part.to_mask(), 16, scale=32**-0.5)
    torch.testing.assert_close(out, exact.float(), atol=2e-6, rtol=1e-5)


def test_grouped_heads_equal_repeated_ones():
    q, k, v = make_qkv(300, heads=6, kv_heads=2)
    grouped, selection = stem_attention(q, k, v, config=SMALL, return_selection=True)
    out, repeated = stem_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), config=SMALL, return_selection=True
    )
    assert torch.equal(selection.to_mask(), repeated.to_mask())
    torch.testing.assert_close(out, grouped, atol=1e-6, rtol=1e-5)


FIELD_CHANGES = {
    "block_size": 32,
    "score": "mass",
    "stride": 16,
    "spread_weight": 3.0,
    "value_term": "zscore",
    "value_weight": 2.0,
    "budget_ratio": 0.4,
    "budget_bias": 6,
    "budget_scale": 2.0,
    "budget_floor": 8,
    "dense_below": 100,
    "decay": 0.3,
    "decay_from": "first_row",
    "tail_blocks": 3,
    "tail_ratio": 0.5,
    "budget_scope": "layer",
    "head_floor": 1.0,
    "residual": "mean",
    "sink_blocks": 3,
    "local_blocks": 4,
    "forced_blocks": "on_top",
}
# Settings without which a field has nothing to do.
NEEDS = {"spread_weight": {"score": "mass"}, "head_floor": {"budget_scope": "layer"}, "tail_ratio": {"tail_blocks": 3}}


# The precision has one on a Hopper GPU: tests/backends/test_fp8.py.
@pytest.mark.parametrize("field", [name for name in field_names() if name != "precision"])
def test_every_field_has_an_effect(field):
    base = dataclasses.replace(SMALL, **NEEDS.get(field, {}))
    q, k, v = make_qkv(400)
    v = v * torch.logspace(-1, 1, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(1))][:, None]
    changed = dataclasses.replace(base, **{field: FIELD_CHANGES[field]})
    out, selection = stem_attention(q, k, v, config=base, return_selection=True)
    other, reselected = stem_attention(q, k, v, config=changed, return_selection=True)
    assert not torch.allclose(out, other, atol=1e-4)
    if field != "residual":
        before, after = selection.to_mask(), reselected.to_mask()
        assert before.shape != after.shape or not torch.equal(before, after)


def test_prompt_len_sets_the_budget():
    q, k, v = make_qkv(100, 400)
    short = select_blocks(q, k, v, config=SMALL)
    assert select_blocks(q, k, v, config=SMALL, prompt_len=4000).density() > short.density()


def test_the_config_holds_at_any_length_and_has_a_name():
    q, k, v = make_qkv(4000)
    selection = select_blocks(q, k, v)
    assert torch.equal(selection.to_mask(), select_blocks(q, k, v, config="default").to_mask())
    assert 12 <= selection.counts[..., 20:30].float().mean() <= 15  # the heads share their budgets
    assert select_blocks(q, k, v, config="paper").density() == 1.0  # it keeps 54 of 32 blocks


def test_scale_is_that_of_the_logits():
    q, k, v = make_qkv(300)
    out, selection = stem_attention(q, k, v, config=SMALL, scale=0.7, return_selection=True)
    exact, mask = reference_stem(q, k, v, SMALL, scale=0.7)
    assert torch.equal(selection.to_mask(), mask)
    lost = (dense(q, k, v, scale=0.7) - dense(q.double(), k.double(), v.double(), scale=0.7)).abs().max()
    assert (out - exact).abs().max() <= 2 * lost


@pytest.mark.parametrize("window", [1, 16, 40, 1000])
def test_window_and_log_sum_exp(window):
    q, k, v = make_qkv(75, 210)
    lengths = {"q_len": 75, "k_len": 210}
    band = BlockSelection.band(batch=1, heads=4, window=window, block_size=16, device="cpu", **lengths)
    out, lse = block_sparse_attention(q, k, v, band, window=window, return_lse=True)
    everything = torch.ones(1, 4, band.grid.q_blocks, band.grid.k_blocks, dtype=torch.bool)
    exact, exact_lse = reference_attention(q, k, v, everything, 16, scale=32**-0.5, window=window)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, exact.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, exact_lse.float(), atol=2e-6, rtol=1e-5)


def test_inputs_may_have_any_strides():
    q, k, v = make_qkv(300, batch=2)
    expected = stem_attention(q, k, v, config=SMALL)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(stem_attention(*strided, config=SMALL), expected, atol=1e-6, rtol=1e-5)
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    torch.testing.assert_close(stem_attention(*apart, config=SMALL), expected, atol=1e-6, rtol=1e-5)


def test_inputs_are_left_as_they_were():
    q, k, v = make_qkv(300)
    copies = [x.clone() for x in (q, k, v)]
    stem_attention(q, k, v, config=SMALL)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    def step(q, k, v, band):
        out = stem_attention(q * 2, k, v, config=SMALL, prompt_len=500)
        again, selection = stem_attention(q * 2, k, v, config=SMALL, return_selection=True)
        kept = select_blocks(q, k, v, config="default", prompt_len=q.shape[2] + 100)
        from_kept = block_sparse_attention(q, k, v, kept)
        banded, lse = block_sparse_attention(q, k, v, band, window=20, return_lse=True)
        packed = stem_attention_varlen(
            *(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens_q=[0, 50, q.shape[2]], config=SMALL
        )
        selections = [x for s in (selection, kept) for x in (s.to_mask(), s.counts)]
        return out + 1, again, *selections, from_kept, banded, lse, packed * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (200, 333):
        q, k, v = make_qkv(length)
        band = BlockSelection.band(batch=1, heads=4, window=20, block_size=16, q_len=length, k_len=length, device="cpu")
        for got, expected in zip(compiled(q, k, v, band), step(q, k, v, band), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch cannot be told")
def test_torch_is_told_that_no_cuda_graph_may_record_the_operator():
    assert torch.Tag.cudagraph_unsafe in torch.ops.stem_attn.prefill.default.tags


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_beside_cuda_graphs_lengths_are_read_at_every_call():
    def step(q, k, v, starts):
        return stem_attention_varlen(q * 2, k, v, cu_seqlens_q=starts, config=SMALL) + 1

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for seed, middle in enumerate((50, 50, 50, 50, 120, 77)):  # the first calls warm up and record
        q, k, v = (x[0].transpose(0, 1).cuda() for x in make_qkv(200, seed=seed))
        starts = torch.tensor([0, middle, 200])
        torch.testing.assert_close(compiled(q, k, v, starts), step(q, k, v, starts))


def test_what_cannot_be_traced_says_so():
    q, k, v = make_qkv(64)
    method = methods.make("a_shape", block_size=16)
    compiled = torch.compile(lambda *x: stem_attention(*x, method=method), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"method cannot be traced|Observed exception"):  # what torch 2.6 makes of it
        compiled(q, k, v)


def good():
    return make_qkv(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be a tensor \[batch, heads, tokens, head_dim\], got \[4, 64, 32\]"),
        (lambda q, k, v: (q, k.half(), v), "share one floating dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "floating dtype"),
        (lambda q, k, v: (q, k.to("meta"), v), "on one device"),
        (lambda q, k, v: (q[:, :3], k, v), "multiple of KV heads, got 3 and 2"),
        (lambda q, k, v: (q, k[:, :, :32], v[:, :, :32]), "more tokens than k, got 64 and 32"),
        (lambda q, k, v: (q, k, v[:, :, :60]), "k and v must agree"),
        (lambda q, k, v: (q, k[..., :16], v), "batch and head_dim"),
        (lambda q, k, v: (q[:, :, :0], k, v), "must not be empty"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "no backward"),
        (lambda q, k, v: (None, k, v), "got NoneType"),
        (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), "must hold numbers"),
    ],
)
def test_bad_tensors_are_refused_before_any_work(change, message):
    q, k, v = change(*good())
    with pytest.raises(ValueError, match=message):
        stem_attention(q, k, v, config=SMALL)
    with pytest.raises(ValueError, match=message):
        select_blocks(q, k, v, config=SMALL)


def test_gradients_are_fine_where_none_are_recorded():
    q, k, v = good()
    with torch.no_grad():
        stem_attention(q.requires_grad_(), k, v, config=SMALL)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": {"block_size": 16}}, "must be a StemConfig"),
        ({"scale": float("nan")}, "finite"),
        ({"scale": "1"}, "finite"),
        ({"prompt_len": 63}, "at least k's 64 tokens"),
        ({"prompt_len": [64, 64]}, "1 ints"),
        ({"prompt_len": 64.0}, "prompt_len"),
        ({"backend": "cuda"}, "one of auto, triton, fa4, cpu; got 'cuda'"),
    ],
)
def test_bad_options_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        stem_attention(*good(), **kwargs)


def test_selection_must_fit():
    q, k, v = good()
    selection = select_blocks(q, k, v, config=SMALL)
    with pytest.raises(ValueError, match="q_len=64"):
        block_sparse_attention(q[:, :, 1:], k, v, selection)
    with pytest.raises(ValueError, match=r"rows \[B, Hq, Qb\] = \[1, 2, 4\]"):
        block_sparse_attention(q[:, :2], k, v, selection)
    with pytest.raises(ValueError, match="window must be"):
        block_sparse_attention(q, k, v, selection, window=0)
    with pytest.raises(ValueError, match="BlockSelection"):
        block_sparse_attention(q, k, v, selection.to_mask())


def test_a_backend_asked_for_by_name_is_used_or_refused(monkeypatch):
    q, k, v = good()
    for name, reason in backends.available().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available here"):
                stem_attention(q, k, v, config=SMALL, backend=name)
    calls = []
    cpu = backends.by_name("cpu")
    monkeypatch.setattr(type(cpu), "why_unsupported", lambda self, *a, **kw: calls.append(1) or "it is Sunday")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: it is Sunday"):
        stem_attention(q, k, v, config=SMALL, backend="cpu")
    before = sum(backends.fallbacks().values())
    with pytest.raises(RuntimeError, match="no backend can run"):
        stem_attention(q, k, v, config=SMALL)
    assert sum(backends.fallbacks().values()) == before + 1


def test_what_no_backend_computes_is_told_ahead_of_prompts():
    layer = {"head_dim": 64, "dtype": torch.float32, "device": "cpu"}
    before = backends.fallbacks()
    for name in ("auto", "cpu"):
        backends.check_ahead(name, StemConfig(), **layer, softcap=30.0)
    eight = StemConfig(precision="fp8")
    with pytest.raises(ValueError, match=r"no backend can run this call with precision='fp8': .*cpu: it multiplies"):
        backends.check_ahead("auto", eight, **layer)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: it multiplies"):
        backends.check_ahead("cpu", eight, **layer)
    with pytest.raises(ValueError, match="softcap must be None or a finite number above 0, got -1"):
        backends.check_ahead("auto", StemConfig(), **layer, softcap=-1.0)
    assert backends.fallbacks() == before


def test_importing_needs_torch_only():
    program = """
import sys
for name in ("transformers", "triton", "flash_attn", "rich", "typer", "gguf", "accelerate", "matplotlib"):
    sys.modules[name] = None  # importing it raises, and torch, which looks for Triton, finds none
import torch
before = torch.nn.functional.scaled_dot_product_attention
import stem_attn
assert torch.nn.functional.scaled_dot_product_attention is before
q = torch.randn(1, 2, 100, 16)
stem_attn.stem_attention(q, q, q, config=stem_attn.StemConfig(block_size=16))
assert "not installed" in stem_attn.backends.available()["triton"]
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr
