"""`PagedPrefill`: in every layer to the bit what `stem_attention_paged` gives, and less to do for the host."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from helpers import SMALL
from stem_attn import PagedPrefill, StemConfig, paged, stem_attention_paged
from test_paged import DEVICE, GPU, draw, page_out

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's
MASS = dataclasses.replace(SMALL, score="mass", stride=8, budget_scope="layer")
LENGTHS = [(43, 150)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[StemConfig]:
    """The configs of the layers that took the long way."""
    configs = []

    def noted(*tensors, config, **arguments):
        configs.append(config)
        return stem_attention_paged(*tensors, config=config, **arguments)

    monkeypatch.setattr(paged, "stem_attention_paged", noted)
    return configs


@pytest.fixture
def triton():
    return pytest.importorskip("stem_attn.backends.triton")


def scaled(config: StemConfig, *scales: float) -> list[StemConfig]:
    return [dataclasses.replace(config, budget_scale=scale) for scale in scales]


def layer(number: int, lengths=LENGTHS, **kinds) -> dict:
    """The inputs of one layer: other numbers than those of other layers in the same pages."""
    kinds = {"dim": 64, "dtype": torch.float16} | kinds
    parts = [tuple(x * (1 + number / 4) for x in part) for part in draw(lengths, **kinds)]
    return page_out([(q, k.roll(number, 2), v.flip(2) if number % 2 else v) for q, k, v in parts], 16)


def poison(prefill: PagedPrefill) -> None:
    """Leave NaN, and indices of no block, where the layers have their memory."""
    for part in prefill._prepared._parts:
        for x in part.operands.values():
            if isinstance(x, torch.Tensor) and x.numel():
                x.fill_(torch.nan if x.is_floating_point() else -(2**30))


def run_all(configs, inputs, backend="triton", extra=lambda n: {}, **how) -> PagedPrefill:
    """Run a layer for every config, and compare each with the ordinary call."""
    first = inputs(0)
    sequences = {name: first[name] for name in ("cu_seqlens_q", "seq_lens", "block_table")}
    prefill = PagedPrefill(**sequences, prompt_len=how.get("prompt_len"), backend=backend)
    new_out = how.get("new_out", torch.empty_like)
    for n, config in enumerate(configs):
        x = inputs(n)
        tensors = x["q"], x["k_cache"], x["v_cache"]
        expected, selections = stem_attention_paged(
            *tensors, **sequences, config=config, backend=backend, return_selection=True,
            prompt_len=prefill._sequences["prompt_len"], **extra(n),
        )  # fmt: skip
        out = new_out(expected).fill_(torch.nan)
        counts = prefill.run(*tensors, config=config, out=out, **extra(n))
        assert torch.equal(out, expected)
        for got, selection in zip(counts, selections, strict=True):
            assert torch.equal(got, selection.counts)
        if prefill._prepared is not None:
            poison(prefill)
    return prefill


@pytest.mark.parametrize("config", [SMALL, MASS], ids=["linear", "mass"])
def test_layers_with_budgets_of_their_own(config, asked, triton):
    configs = scaled(config, 1.5, 1.0, 0.5)
    run_all(configs, layer, prompt_len=[170])
    assert asked == configs[:1]


def test_a_layer_that_keeps_everything_and_one_that_keeps_more_than_there_is_room_for(asked, triton):
    alone = dataclasses.replace(MASS, budget_ratio=0.151)  # no other test makes its budgets
    few, more, everything = scaled(alone, 0.4, 2.0, 9.0)
    run_all([few, few, everything, few, more, few], layer)
    assert asked == [few, everything, more]
    asked.clear()
    for lengths in (LENGTHS, [(61, 175)]):  # they are known by now, at the length where they were met and at another
        run_all([few, few, everything, few, more, few], lambda n, lengths=lengths: layer(n, lengths))
    assert asked == [few, few]


@pytest.mark.parametrize("sinks", [False, True])
def test_layers_that_are_known_to_keep_everything(sinks, asked, monkeypatch, triton):
    from stem_attn.backends.triton import prepared

    few, everything = scaled(dataclasses.replace(MASS, budget_ratio=0.149), 0.4, 9.0)
    extra = {"sinks": torch.randn(2, device=DEVICE), "softcap": 3.0} if sinks else {}
    run_all([everything, few], layer)  # from now on their budgets are made together
    asked.clear()
    run_all([few, everything, few], lambda n: layer(n, [(61, 173)]), extra=lambda _: extra)
    assert asked == [few]
    monkeypatch.setattr(prepared, "goes_in_one", lambda *_: False)
    asked.clear()
    # The second sequence's rows are the prompt's last two, which keep everything in all layers.
    tail = [dataclasses.replace(c, tail_blocks=2) for c in (everything, few)]
    run_all([*tail, tail[0]], lambda n: layer(n, [(61, 175), (20, 100)]), extra=lambda _: extra)
    asked.clear()
    run_all([tail[1], tail[0], tail[1]], lambda n: layer(n, [(61, 190), (20, 120)]), extra=lambda _: extra)
    assert asked == [tail[1]]


@pytest.mark.parametrize("config", [SMALL, MASS], ids=["linear", "mass"])
def test_sinks_and_a_softcap(config, asked, triton):
    sinks = [torch.randn(2, device=DEVICE) for _ in range(3)]
    run_all([config] * 3, layer, extra=lambda n: {"softcap": 2.0, "sinks": sinks[n]})
    assert len(asked) == 1


def test_other_layouts_and_methods_take_the_long_way(asked, triton):
    """And are prepared themselves."""
    wide = layer(1)
    wide["q"] = torch.cat([wide["q"], wide["q"]], 1)[:, :2]
    inputs = [layer(0), layer(1), wide, wide, layer(3, heads=4), layer(0, dtype=torch.float32)]
    run_all([MASS] * 6, lambda n: inputs[n])
    assert len(asked) == 4
    asked.clear()
    run_all([MASS, MASS, SMALL, MASS], layer)
    assert asked == [MASS, SMALL]


@pytest.mark.parametrize("changed", [{"residual": "mean"}, {"precision": "fp8"}])
def test_what_other_kernels_compute_is_not_prepared(changed, asked, triton):
    if changed == {"precision": "fp8"} and not GPU:
        pytest.skip("a GPU computes it")
    sizes = {"block_size": 128, "stride": 8} if GPU else {}
    config = dataclasses.replace(MASS, **sizes, **changed)
    prefill = run_all([config] * 2, lambda n: layer(n, [(200, 900)], dim=128) if GPU else layer(n))
    assert prefill._prepared is None
    assert len(asked) == 2


def test_a_layer_that_other_kernels_compute(asked, triton):
    mean = dataclasses.replace(MASS, residual="mean")
    run_all([MASS, MASS, mean, MASS], layer)
    assert asked == [MASS, mean]


@pytest.mark.parametrize("first", [0, 1])
def test_an_output_within_another_tensor(first, asked, triton):
    """With strides of its own, and, at 1, on a GPU at an address that no kernel for whole vectors may write to."""
    held = []

    def new_out(like):
        held.append(torch.zeros(like.shape[0], 2 * like.shape[1], like.shape[2] + 8, dtype=like.dtype, device=DEVICE))
        return held[-1][:, : like.shape[1], first : first + like.shape[2]]

    run_all([MASS] * 3, layer, new_out=new_out)
    assert len(asked) == 1
    for x in held:
        assert not x[:, 2:].any()
        assert not x[..., :first].any()
        assert not x[..., 64 + first :].any()


def test_calls_that_take_turns_are_not_prepared(monkeypatch, triton):
    monkeypatch.setattr(paged.run, "prepare", lambda *_: pytest.fail("prepared"))
    run_all([MASS] * 4, lambda n: layer(n, heads=2 + 2 * (n % 2)))


def test_nothing_of_the_first_layer_is_kept(triton):
    x = layer(0)
    caches = x.pop("k_cache"), x.pop("v_cache")
    q = x.pop("q")
    out = torch.empty_like(q)
    kept = [weakref.ref(t.untyped_storage()) for t in (q, out)]
    prefill = PagedPrefill(**x, backend="triton")
    for _ in range(2):
        prefill.run(q, *caches, config=MASS, out=out)
    assert prefill._prepared is not None
    del q, out
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_several_sequences_with_a_launch_each(asked, monkeypatch, triton):
    """As on Hopper GPUs; here by the portable kernel."""
    from stem_attn.backends.triton import prepared

    monkeypatch.setattr(prepared, "goes_in_one", lambda *_: False)
    lengths = [(24, 90), (43, 150), (20, 170)]
    base = dataclasses.replace(MASS, budget_scope="head", sink_blocks=0)
    prefill = run_all(scaled(base, 1.5, 0.5), lambda n: layer(n, lengths), prompt_len=[200, 210, 220])
    assert len(asked) == 1
    starts = {part.operands["pooled"].data_ptr() for part in prefill._prepared._parts}
    assert len(starts) == 1  # they use the same memory, in turn


def test_short_sequences_go_in_one_launch(asked, triton):
    prefill = run_all(scaled(MASS, 1.0, 0.5), lambda n: layer(n, [(30, 100), (9, 9), (43, 150)]))
    assert prefill._prepared is None
    assert len(asked) == 2


def test_the_cpu_backend(asked):
    prefill = run_all(scaled(MASS, 1.0, 0.5), lambda n: layer(n, [(30, 100), (43, 150)]), backend="cpu")
    assert prefill._prepared is None
    assert len(asked) == 2


@pytest.mark.skipif(not GPU, reason="the Hopper kernel runs on GPUs only")
@pytest.mark.parametrize("config", ["default", "official"])
def test_long_sequences_of_a_server(config, asked):
    """Several, one of them short, one layer with everything, each by the Hopper kernel."""
    base = StemConfig.preset(config)
    configs = scaled(base, 1.7, 1.0, 9.0, 0.3)
    lengths = [(1500, 9000), (3000, 12100), (130, 10000)]
    kinds = {"dim": 128, "heads": 16, "dtype": torch.bfloat16}
    run_all(configs, lambda n: layer(n, lengths, **kinds), prompt_len=[19000] * 3)  # from now on they are known
    asked.clear()
    prefill = run_all(configs, lambda n: layer(n, lengths, **kinds), prompt_len=[20000] * 3)
    assert asked == configs[:1]
    spans = [
        (x.data_ptr(), x.data_ptr() + x.nbytes)
        for part in prefill._prepared._parts
        for name, x in part.operands.items()
        if name in ("pooled", "scores", "indices")
    ]
    one = [stop - start for start, stop in spans]
    assert max(stop for _, stop in spans) - min(start for start, _ in spans) < sum(one)  # they lie over one another


@pytest.mark.skipif(not GPU, reason="streams are a GPU's")
def test_another_stream_and_a_captured_graph(asked):
    x = layer(0)
    tensors = x.pop("q"), x.pop("k_cache"), x.pop("v_cache")
    prefill = PagedPrefill(**x, backend="triton")
    expected = stem_attention_paged(*tensors, **x, config=MASS, backend="triton")
    outs = [torch.empty_like(expected) for _ in range(4)]
    for out in outs[:2]:
        prefill.run(*tensors, config=MASS, out=out)
    assert len(asked) == 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        prefill.run(*tensors, config=MASS, out=outs[2])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill.run(*tensors, config=MASS, out=outs[3])
    graph.replay()
    torch.cuda.synchronize()
    assert len(asked) == 3
    assert all(torch.equal(out, expected) for out in outs)


def test_bad_input_in_a_later_layer(triton):
    x = layer(0)
    tensors = x.pop("q"), x.pop("k_cache"), x.pop("v_cache")
    prefill = PagedPrefill(**x, backend="triton")
    out = torch.empty_like(tensors[0])
    for _ in range(2):
        prefill.run(*tensors, config=MASS, out=out)
    with pytest.raises(ValueError, match="out must be"):
        prefill.run(*tensors, config=MASS, out=out[:-1])
    with pytest.raises(ValueError, match="q must be a tensor"):
        prefill.run(None, *tensors[1:], config=MASS, out=out)
    with pytest.raises(ValueError, match="sinks"):
        prefill.run(*tensors, config=MASS, out=out, sinks=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="no backward"):
        prefill.run(tensors[0].clone().requires_grad_(), *tensors[1:], config=MASS, out=out)
    with pytest.raises(ValueError, match="preset"):
        prefill.run(*tensors, config="fastest", out=out)
    with pytest.raises(ValueError, match="out must be a tensor"):
        prefill.run(*tensors, config=MASS, out=None)
    with pytest.raises(ValueError, match="sinks must be"):
        prefill.run(*tensors, config=MASS, out=out, sinks=np.zeros(2))
    with pytest.raises(ValueError, match="scale"):
        prefill.run(*tensors, config=MASS, out=out, scale=True)
