"""Sinks, one more logit a head, and a softcap on logits: every backend and layout against float64."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from helpers import SMALL, assert_same_blocks, make_qkv
from stem_attn import (
    BlockSelection,
    StemConfig,
    block_sparse_attention,
    select_blocks,
    stem_attention,
    stem_attention_paged,
    stem_attention_varlen,
)
from stem_attn.backends.cpu import native
from stem_attn.backends.fa4 import Fa4Backend
from stem_attn.blocks import BlockGrid
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention, reference_scores, reference_stem
from stem_attn.scoring import block_scores

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # the interpreter has no bfloat16 products
MASS = StemConfig(block_size=16, stride=4, budget_ratio=0.15, budget_bias=2, tail_blocks=0)
PROPERTIES = [(2.0, False), (None, True), (3.0, True)]


@pytest.fixture(params=["cpu", "cpu in torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, way = request.param.partition(" ")
    if name == "triton":
        pytest.importorskip("triton")
    if way:
        monkeypatch.setenv(native.SWITCH, "0")
    return name


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before anything writes them."""
    make = Call.new_output
    monkeypatch.setattr(Call, "new_output", lambda call: make(call).fill_(torch.nan))


def on_device(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to("cuda" if GPU and backend == "triton" else "cpu") for x in tensors]


def sinks_of(heads: int) -> Tensor:
    """From one that nothing falls to, to one that takes nearly all."""
    return torch.linspace(-3, 5, heads)


def random_mask(q_len: int, k_len: int, size: int, *, batch: int = 1, heads: int = 2) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    grid = BlockGrid(q_len, k_len, size)
    columns, diagonal = torch.arange(grid.k_blocks), grid.block_ids()[:, None]
    drawn = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < 0.4
    return (drawn & (columns < diagonal)) | (columns == diagonal)


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """What dense attention of a dtype loses: logits and sums in float32, weights and outputs in the dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = q.float() @ k.float().mT * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:3], 1)], -1)
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp()
    whole = weights.sum(-1, keepdim=True)
    weights = weights[..., : k.shape[2]].to(v.dtype)
    return (weights.float() @ v.float() / whole).to(v.dtype)


def check(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: int, softcap: float | None, sink: bool, **how
) -> None:
    """At most twice the error that dense attention makes in the same dtype over the same pairs."""
    sinks = sinks_of(q.shape[1]) if sink else None
    scale = how.pop("scale", q.shape[3] ** -0.5)
    grid = BlockGrid(q.shape[2], k.shape[2], size)
    i, j = torch.arange(grid.q_len)[:, None] + grid.offset, torch.arange(grid.k_len)
    window = how.get("window") or grid.k_len
    seen = mask[:, :, i // size - grid.first_block, j // size] & (j <= i) & (j > i - window)
    lost = dense(q, k, v, seen, scale, softcap, sinks).double()
    exact, exact_lse = reference_attention(q, k, v, mask, size, scale=scale, softcap=softcap, sinks=sinks, **how)
    if how.get("residual", "none") == "none":
        lost -= exact
    else:  # of dense attention over the kept blocks alone
        kept, _ = reference_attention(q, k, v, mask, size, scale=scale, softcap=softcap, sinks=sinks)
        lost -= kept
    selection = BlockSelection.from_mask(mask, block_size=size, q_len=grid.q_len, k_len=grid.k_len)
    q, k, v, indices, counts = on_device(backend, q, k, v, selection.indices, selection.counts)
    selection = BlockSelection.made(indices, counts, grid)
    sinks = None if sinks is None else sinks.to(q.device)
    out, lse = block_sparse_attention(
        q, k, v, selection, scale=scale, softcap=softcap, sinks=sinks, return_lse=True, backend=backend, **how
    )
    error = out.double().cpu() - exact
    stored = 0.0
    if how.get("residual", "none") != "none" and backend == "triton":  # kept in q's dtype between two launches
        stored = float(kept.abs().max()) * torch.finfo(q.dtype).eps / 2
    floor = 4e-7  # a handful of tokens may come out exact by chance
    assert out.dtype == q.dtype
    assert error.abs().max() <= 2 * lost.abs().max() + stored + floor
    assert error.square().mean().sqrt() <= 2 * lost.square().mean().sqrt() + floor / 4
    torch.testing.assert_close(
        lse.double().cpu(), exact_lse, atol=2e-3 if q.dtype != torch.float32 else 2e-5, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("softcap", "sink"), PROPERTIES)
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (63, 63), (1, 129), (75, 210), (111, 256)])
def test_matches_float64(backend, q_len, k_len, softcap, sink, dtype):
    """Odd lengths, prefixes that end inside a block, tails; heads in groups, and v with its own dim."""
    q, k, v = make_qkv(q_len, k_len, heads=2, kv_heads=1, dim=40, v_dim=24, dtype=dtype)
    check(backend, q, k, v, random_mask(q_len, k_len, 32), 32, softcap, sink)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "sink"), PROPERTIES)
def test_other_dtypes_on_the_cpu(softcap, sink, dtype):
    q, k, v = make_qkv(130, 260, batch=2, dim=64, dtype=dtype)
    check("cpu", q, k, v, random_mask(130, 260, 48, batch=2, heads=4), 48, softcap, sink)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("softcap", [50.0, 20.0])
def test_logits_of_a_real_model(backend, softcap, dtype):
    """Logits of standard deviation 3 under the softcap of Gemma 2, and under a lower one."""
    q, k, v = make_qkv(300, heads=2, kv_heads=1, dim=64, dtype=dtype)
    check(backend, q * 3, k, v, random_mask(300, 300, 64), 64, softcap, True)


@pytest.mark.parametrize("window", [1, 17, 64, 1000])
def test_bands(backend, window):
    q, k, v = make_qkv(75, 210, heads=2, kv_heads=1, dtype=HALVES[0])
    check(backend, q, k, v, random_mask(75, 210, 32), 32, 2.0, True, window=window)


@pytest.mark.parametrize("scale", [0.4, 0.0, -0.2])
def test_scale_of_any_sign(backend, scale):
    q, k, v = make_qkv(130, heads=2, kv_heads=1)
    check(backend, q, k, v, random_mask(130, 130, 32), 32, 1.5, True, scale=scale)


@pytest.mark.parametrize(("softcap", "sink"), PROPERTIES)
def test_pruned_blocks_means_are_capped_and_share_with_the_sink(backend, softcap, sink):
    for dtype in (torch.float32, HALVES[0]):
        q, k, v = make_qkv(100, 256, heads=2, kv_heads=1, dim=40, v_dim=24, dtype=dtype)
        check(backend, q, k, v, random_mask(100, 256, 32), 32, softcap, sink, residual="mean")


@pytest.mark.skipif(not GPU, reason="the Hopper kernel runs on GPUs only")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize(("softcap", "sink"), PROPERTIES)
@pytest.mark.parametrize(("size", "dim"), [(64, 128), (128, 64), (128, 128), (128, 256)])
def test_the_fastest_kernel_of_a_gpu(size, dim, softcap, sink, window, dtype):
    q, k, v = make_qkv(1000, 1333, heads=2, kv_heads=1, dim=dim, dtype=dtype)
    check("triton", q, k, v, random_mask(1000, 1333, size), size, softcap, sink, window=window)


@pytest.mark.skipif(not GPU, reason="the Hopper kernel runs on GPUs only")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("softcap", "sink"), PROPERTIES)
@pytest.mark.parametrize("size", [64, 128])
def test_means_in_the_fastest_kernel_of_a_gpu(size, softcap, sink, dtype):
    q, k, v = make_qkv(1000, 1333, heads=2, kv_heads=1, dim=128, dtype=dtype)
    check("triton", q, k, v, random_mask(1000, 1333, size), size, softcap, sink, residual="mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_have_a_dtype_and_strides_of_their_own(backend, dtype):
    q, k, v = make_qkv(70, heads=4, kv_heads=2, dtype=HALVES[0])
    (sinks,) = on_device(backend, torch.tensor([0.5, 1.5, -2.0, 3.0]))  # exact in all dtypes
    q, k, v = on_device(backend, q, k, v)
    how = {"config": SMALL, "backend": backend}
    expected = stem_attention(q, k, v, sinks=sinks, **how)
    strided = torch.stack([sinks, sinks + 7], 1).to(dtype)[:, 0]
    assert strided.stride(0) == 2
    assert torch.equal(stem_attention(q, k, v, sinks=strided, **how), expected)


def test_a_sink_of_minus_infinity_is_none(backend):
    q, k, v, sinks = on_device(backend, *make_qkv(70, heads=2, kv_heads=1), torch.full((2,), -torch.inf))
    how = {"config": dataclasses.replace(MASS, residual="mean"), "backend": backend}
    assert torch.equal(stem_attention(q, k, v, sinks=sinks, **how), stem_attention(q, k, v, **how))


def test_a_sink_above_all_logits_leaves_nothing(backend):
    """The log-sum-exp is then the sink, not infinite: it is what FlashAttention's gives where nothing else counts."""
    q, k, v, sinks = on_device(backend, *make_qkv(40, heads=2, kv_heads=1), torch.tensor([300.0, 3.0]))
    everything = BlockSelection.everything(batch=1, heads=2, grid=BlockGrid(40, 40, 16), device=q.device)
    out, lse = block_sparse_attention(q, k, v, everything, sinks=sinks, return_lse=True, backend=backend)
    assert bool((out[:, 0] == 0).all())
    assert bool((lse[:, 0] == 300).all())
    exact, exact_lse = (x[:, 1].float() for x in reference_attention(
        *(x.cpu() for x in (q, k, v)), everything.to_mask().cpu(), 16, scale=32**-0.5, sinks=sinks.cpu()
    ))  # fmt: skip
    torch.testing.assert_close(out[:, 1].cpu(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse[:, 1].cpu(), exact_lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("config", [MASS, SMALL], ids=["mass", "linear"])
def test_a_bad_sink_harms_its_own_head_only(backend, config, bad):
    """As softmax does: NaN in every output of the head. Other heads keep their blocks where budgets are their own."""
    config = dataclasses.replace(config, budget_scope="head")
    q, k, v, sinks = on_device(backend, *make_qkv(70, heads=4, kv_heads=2), sinks_of(4))
    how = {"config": config, "backend": backend, "return_selection": True}
    expected, blocks = stem_attention(q, k, v, sinks=sinks, **how)
    sinks[2] = bad
    out, selection = stem_attention(q, k, v, sinks=sinks, **how)
    assert bool(out[:, 2].isnan().all())
    others = [0, 1, 3]
    assert torch.equal(out[:, others], expected[:, others])
    assert torch.equal(selection.to_mask()[:, others], blocks.to_mask()[:, others])
    BlockSelection(selection.indices, selection.counts, 16, 70, 70)  # of the bad head too


def test_an_infinite_logit_is_capped(backend):
    q, k, v = on_device(backend, *make_qkv(40, heads=1, kv_heads=1))
    k[:, :, 7], q[:, :, 20] = 1e20, 1e20
    out = stem_attention(q, k, v, config=SMALL, softcap=5.0, backend=backend)
    assert bool(out.isfinite().all())
    assert not bool(stem_attention(q, k, v, config=SMALL, backend=backend).isfinite().all())


# -- which blocks are kept --


@pytest.mark.parametrize("scope", ["head", "group", "layer"])
@pytest.mark.parametrize("score", ["linear", "mass"])
@pytest.mark.parametrize(("softcap", "sink"), PROPERTIES)
def test_selections_equal_the_reference(backend, score, scope, softcap, sink):
    config = dataclasses.replace(MASS, score=score, budget_scope=scope, value_weight=0.5)
    q_len, k_len = (129, 403) if backend == "cpu" or GPU else (20, 120)
    q, k, v = make_qkv(q_len, k_len, heads=4, kv_heads=2, v_dim=24)
    q = q * torch.linspace(0.2, 3, 4)[:, None, None]  # heads from diffuse to concentrated
    sinks = sinks_of(4) if sink else None
    logits = {"scale": 0.3, "softcap": softcap, "sinks": sinks}
    exact = reference_scores(q, k, v, config, **logits)
    _, mask = reference_stem(q, k, v, config, **logits)
    causal = torch.arange(mask.shape[3]) <= BlockGrid(q_len, k_len, 16).block_ids()[:, None]
    rounding = float((block_scores(q, k, v, config, **logits) - exact)[..., causal].abs().max())
    assert rounding < 1e-4
    inputs = on_device(backend, q, k, v)
    if sinks is not None:
        logits["sinks"] = sinks.to(inputs[0].device)
    made = select_blocks(*inputs, config=config, **logits, backend=backend)
    made = BlockSelection(made.indices.cpu(), made.counts.cpu(), 16, q_len, k_len)
    assert_same_blocks(made, mask, exact, rounding)


def test_the_softcap_changes_what_is_kept():
    q, k, v = make_qkv(300, heads=4, kv_heads=2)
    for config in (MASS, dataclasses.replace(MASS, score="linear", value_weight=1.0)):
        plain, capped = (select_blocks(q * 40, k, v, config=config, softcap=cap).to_mask() for cap in (None, 1.0))
        assert not torch.equal(plain, capped)
        far = select_blocks(q * 40, k, v, config=config, softcap=1e6).to_mask()
        assert torch.equal(plain, far)


def test_heads_whose_attention_goes_to_the_sink_give_blocks_up():
    """A shared budget goes where values are read; the sum over the heads stays the same."""
    q, k, v = make_qkv(400, heads=2, kv_heads=1)
    q[:, 1], sinks = q[:, 0], torch.tensor([-torch.inf, 12.0])
    config = dataclasses.replace(MASS, budget_scope="group", head_floor=0.25)
    plain = select_blocks(q, k, v, config=config)
    sunk = select_blocks(q, k, v, config=config, sinks=sinks)
    assert torch.equal(plain.counts.sum(1), sunk.counts.sum(1))
    late = slice(10, None)  # rows that prune
    assert bool((sunk.counts[:, 0, late] > sunk.counts[:, 1, late]).all())
    assert bool((sunk.counts[:, 1, late] < plain.counts[:, 1, late]).any())


def test_the_same_sink_for_all_heads_of_equal_rows_changes_nothing():
    """Where every query group of a row has the same mass, a sink lowers all its shares alike."""
    _, k, v = make_qkv(300, heads=4, kv_heads=2)
    config = dataclasses.replace(MASS, budget_scope="head")
    q = torch.zeros(1, 4, 300, 32)
    assert torch.equal(
        select_blocks(q, k, v, config=config).to_mask(),
        select_blocks(q, k, v, config=config, sinks=torch.full((4,), 9.0)).to_mask(),
    )


# -- layouts --


def test_packed_and_paged_sequences_give_what_each_alone_gives(backend):
    lengths, page = [(25, 100), (9, 9), (34, 70)], 16
    parts = [make_qkv(*pair, heads=2, kv_heads=1, dim=64, dtype=HALVES[0], seed=n) for n, pair in enumerate(lengths)]
    parts = [on_device(backend, *part) for part in parts]
    device = parts[0][0].device
    how = {"config": MASS, "backend": backend, "softcap": 3.0, "sinks": sinks_of(2).to(device)}
    alone = torch.cat([stem_attention(*part, **how)[0].transpose(0, 1) for part in parts])
    q, k, v = (torch.cat([part[n][0].transpose(0, 1) for part in parts]) for n in range(3))
    starts_q, starts_k = ([0, *itertools.accumulate(n)] for n in zip(*lengths, strict=True))
    packed = stem_attention_varlen(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **how)
    assert torch.equal(packed, alone)
    pages = [-(-k_len // page) for _, k_len in lengths]
    table = torch.zeros(3, max(pages), dtype=torch.int32)
    caches = [torch.full((sum(pages), page, 1, 64), torch.nan, dtype=k.dtype, device=device) for _ in range(2)]
    for n, (first, (_, k_len)) in enumerate(zip([0, *itertools.accumulate(pages)], lengths, strict=False)):
        table[n, : pages[n]] = torch.arange(first, first + pages[n])
        for cache, x in zip(caches, parts[n][1:], strict=True):
            cache[first : first + pages[n]].view(-1, 1, 64)[:k_len] = x[0].transpose(0, 1)
    paged = stem_attention_paged(
        q, *caches, cu_seqlens_q=starts_q, seq_lens=[n for _, n in lengths], block_table=table.to(device), **how
    )
    assert torch.equal(paged, alone)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    def step(q, k, v, sinks, band):
        how = {"softcap": 3.0, "sinks": sinks}
        out, selection = stem_attention(q, k, v, config=MASS, return_selection=True, **how)
        kept = select_blocks(q, k, v, config="default", prompt_len=q.shape[2] + 100, **how)
        banded, lse = block_sparse_attention(q, k, v, band, window=20, return_lse=True, **how)
        packed = stem_attention_varlen(
            *(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens_q=[0, 50, q.shape[2]], config=MASS, **how
        )
        return out + 1, selection.to_mask(), kept.to_mask(), banded, lse, packed * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (200, 333):
        q, k, v = make_qkv(length)
        band = BlockSelection.band(batch=1, heads=4, window=20, block_size=16, q_len=length, k_len=length, device="cpu")
        inputs = (q, k, v, sinks_of(4), band)
        for got, expected in zip(compiled(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


# -- what is refused --


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"softcap": 0.0}, "softcap must be None or a finite number above 0, got 0.0"),
        ({"softcap": -1}, "softcap must be None or a finite number above 0, got -1"),
        ({"softcap": torch.nan}, "softcap must be None or a finite number above 0, got nan"),
        ({"softcap": torch.inf}, "softcap must be None or a finite number above 0, got inf"),
        ({"softcap": True}, "softcap must be None or a finite number above 0, got True"),
        ({"softcap": "50"}, "softcap must be None or a finite number above 0, got '50'"),
        ({"sinks": torch.zeros(3)}, r"sinks must be None or a floating tensor \[Hq\] = \[4\], got torch.float32 \[3\]"),
        ({"sinks": torch.zeros(1, 4)}, r"\[Hq\] = \[4\], got torch.float32 \[1, 4\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, r"\[Hq\] = \[4\], got torch.int32 \[4\]"),
        ({"sinks": [0.0] * 4}, r"\[Hq\] = \[4\], got list"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks must be on q's device cpu, got meta"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, "detached sinks"),
    ],
)
def test_bad_input_says_what_was_expected_before_any_work(fields, message, monkeypatch):
    q, k, v = make_qkv(64)
    tokens = [x[0].transpose(0, 1) for x in (q, k, v)]
    everything = BlockSelection.everything(batch=1, heads=4, grid=BlockGrid(64, 64, 16), device="cpu")
    monkeypatch.setattr("stem_attn.backends.for_call", lambda *_: pytest.fail("work has begun"))
    for call in (
        lambda: stem_attention(q, k, v, **fields),
        lambda: select_blocks(q, k, v, **fields),
        lambda: block_sparse_attention(q, k, v, everything, **fields),
        lambda: stem_attention_varlen(*tokens, cu_seqlens_q=[0, 64], **fields),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("fields", [{"softcap": 3.0}, {"sinks": torch.zeros(4)}])
def test_fa4_says_that_it_does_not_take_them(fields, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    call = Call(Layout.dense(*make_qkv(128, dim=64, dtype=torch.float16)), 128, 0.125, **fields)
    assert "softcap" in str(Fa4Backend().why_unsupported(call))
