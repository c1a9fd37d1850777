"""Paged keys and values: what the ordinary call gives, whatever else the cache holds."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helpers import SMALL, make_qkv
from stem_attn import StemConfig, stem_attention, stem_attention_paged
from stem_attn.backends import by_name
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's

Sequences = list[tuple[Tensor, Tensor, Tensor]]
ENGINE = [(1, 1502), (153, 700), (33, 33)]
"""Query and key tokens of a server's mixed batch: a decode, a chunk of a prompt, a whole prompt."""


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make_cache(layout: str, pages: int, page_size: int, heads: int, dim: int, v_dim: int, dtype: torch.dtype):
    """Return views [pages, page_size, heads, dim] of a cache full of NaN, in a layout that engines use."""
    if layout == "heads first, k beside v":
        both = torch.full((pages, heads, page_size, dim + v_dim), torch.nan, dtype=dtype).transpose(1, 2)
        return both[..., :dim], both[..., dim:]
    if layout == "k before v":
        both = torch.full((2, pages, page_size, heads, max(dim, v_dim)), torch.nan, dtype=dtype)
        return both[0, ..., :dim], both[1, ..., :v_dim]
    both = torch.full((pages, 2, page_size, heads, max(dim, v_dim)), torch.nan, dtype=dtype)
    return both[:, 0, ..., :dim], both[:, 1, ..., :v_dim]


LAYOUTS = ["heads first, k beside v", "k before v", "k and v by page"]


def page_out(parts: Sequences, page_size: int, layout: str = LAYOUTS[0], seed: int = 0) -> dict[str, Tensor]:
    """Lay sequences out in pages in random order, among others of NaN; the table's unused entries are wild."""
    gen = torch.Generator().manual_seed(seed)
    needed = [-(-k.shape[2] // page_size) for _, k, _ in parts]
    order = torch.randperm(sum(needed) + 3, generator=gen, dtype=torch.int32)
    (_, heads, _, dim), v_dim = parts[0][1].shape, parts[0][2].shape[3]
    caches = make_cache(layout, len(order), page_size, heads, dim, v_dim, parts[0][1].dtype)
    table = torch.randint(-(2**30), 2**30, (len(parts), max(needed) + 2), generator=gen, dtype=torch.int32)
    for n, (start, stop) in enumerate(pairwise([0, *torch.tensor(needed).cumsum(0).tolist()])):
        table[n, : stop - start] = order[start:stop]
        for cache, x in zip(caches, parts[n][1:], strict=True):
            for i, tokens in enumerate(x[0].transpose(0, 1).split(page_size)):
                cache[order[start + i], : len(tokens)] = tokens
    cu_seqlens_q = [0, *torch.tensor([q.shape[2] for q, _, _ in parts]).cumsum(0).tolist()]
    return {
        "q": torch.cat([q[0].transpose(0, 1) for q, _, _ in parts]).to(DEVICE),
        "k_cache": caches[0].to(DEVICE),
        "v_cache": caches[1].to(DEVICE),
        "cu_seqlens_q": cu_seqlens_q,
        "seq_lens": [k.shape[2] for _, k, _ in parts],
        "block_table": table.to(DEVICE),
    }


def draw(lengths: list[tuple[int, int]], **shape) -> Sequences:
    return [make_qkv(*pair, seed=n, **{"heads": 2, "kv_heads": 1, **shape}) for n, pair in enumerate(lengths)]


def alone(part: tuple[Tensor, Tensor, Tensor], **arguments) -> Tensor:
    """One sequence by the ordinary call, as [tokens, heads, dim]."""
    return stem_attention(*(x.to(DEVICE) for x in part), **arguments)[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[1:])
@pytest.mark.parametrize(("page_size", "layout"), [(16, LAYOUTS[0]), (32, LAYOUTS[1]), (128, LAYOUTS[2])])
def test_exactly_the_unpaged_result(page_size: int, layout: str, dtype: torch.dtype, backend: str) -> None:
    """The same blocks and the same arithmetic, so not a bit differs; pages larger and smaller than a block."""
    size, scale = (64, 8) if GPU else (32, 1)  # the interpreter is slow
    config = StemConfig(block_size=size, budget_ratio=0.2, budget_bias=1, tail_blocks=0)
    lengths = [(45 * scale, 230 * scale), (40 * scale, 150 * scale), (9, 9)]
    parts = draw(lengths, dim=64, dtype=dtype)
    prompt_lens = [250 * scale, 150 * scale, 9]
    arguments = {"config": config, "backend": backend}
    out = stem_attention_paged(**page_out(parts, page_size, layout), prompt_len=prompt_lens, **arguments)
    sparse = 0
    for part, got, n in zip(parts, out.split([q for q, _ in lengths]), prompt_lens, strict=True):
        expected, selection = stem_attention(
            *(x.to(DEVICE) for x in part), prompt_len=n, return_selection=True, **arguments
        )
        sparse += selection.density() < 0.7
        assert torch.equal(got, expected[0].transpose(0, 1))
    assert sparse == 2


@pytest.mark.skipif(not GPU, reason="the Hopper kernel runs on GPUs only")
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(("size", "dim"), [(64, 128), (128, 64), (128, 128), (128, 256)])
def test_the_fastest_kernel_of_a_gpu(size: int, dim: int, page_size: int) -> None:
    """Not a bit differs there either, whether a page holds tiles or a tile takes several pages."""
    config = StemConfig(block_size=size, budget_ratio=0.2, budget_bias=1, tail_blocks=0)
    parts = draw([(700, 1900), (9, 9)], dim=dim, dtype=torch.float16)
    out = stem_attention_paged(**page_out(parts, page_size), config=config, backend="triton")
    assert torch.equal(out, torch.cat([alone(part, config=config, backend="triton") for part in parts]))


@pytest.mark.parametrize("preset", ["default", "official"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128] if GPU else [16, 128])
def test_the_batch_of_an_engine(page_size: int, preset: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":  # short sequences run packed on the portable kernel; alone, some would run on Hopper's
        from stem_attn.backends.triton import attention

        monkeypatch.setattr(attention, "hopper_fits", lambda *_: False)
    overrides = {"budget_ratio": 0.1, "budget_bias": 2, "dense_below": 0, "tail_blocks": 0}
    config = StemConfig.preset(preset, block_size=128, stride=16, sink_blocks=1, local_blocks=1, **overrides)
    parts = draw(ENGINE, dim=64, dtype=torch.float16)
    inputs = page_out(parts, page_size)
    assert inputs["cu_seqlens_q"] == [0, 1, 154, 187]
    out = stem_attention_paged(**inputs, config=config, backend=backend)
    for part, got in zip(parts, out.split([q for q, _ in ENGINE]), strict=True):
        assert torch.equal(got, alone(part, config=config, backend=backend))


def test_the_residual_reads_pages_too(backend: str) -> None:
    config = dataclasses.replace(SMALL, residual="mean")
    parts = draw([(40, 200), (9, 9)], dim=64, dtype=torch.float16)
    inputs = page_out(parts, 16)
    out = stem_attention_paged(**inputs, config=config, backend=backend)
    assert torch.equal(out, torch.cat([alone(part, config=config, backend=backend) for part in parts]))
    assert not torch.equal(out, stem_attention_paged(**inputs, config=SMALL, backend=backend))


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (17, 63), (129, 129), (40, 300)])
@pytest.mark.parametrize(("dim", "v_dim"), [(80, 96), (256, 256), *([(64, 64), (128, 128)] if GPU else [])])
def test_against_float64(dim: int, v_dim: int, q_len: int, k_len: int, backend: str) -> None:
    (part,) = draw([(q_len, k_len)], dim=dim, v_dim=v_dim)
    config = StemConfig(block_size=128, budget_ratio=0.0, budget_bias=1, tail_blocks=0, local_blocks=1)
    out = stem_attention_paged(**page_out([part], 16), config=config, backend=backend)
    _, selection = stem_attention(*part, config=config, backend="cpu", return_selection=True)
    exact, _ = reference_attention(*part, selection.to_mask(), 128, scale=dim**-0.5)
    tolerance = 2e-3 if GPU else 1e-5  # TF32 products there
    torch.testing.assert_close(out.double().cpu(), exact[0].transpose(0, 1), atol=tolerance, rtol=tolerance)


def test_descriptors_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that holds whole key tiles is copied by descriptor; a smaller one is not."""
    pytest.importorskip("triton")
    if GPU:
        pytest.skip("a GPU that has descriptors uses them in the other tests")
    from stem_attn.backends.triton import attention_launches

    monkeypatch.setattr(attention_launches, "has_copy_engine", lambda _: True)
    made = []
    kernel = attention_launches.TensorDescriptor
    monkeypatch.setattr(attention_launches, "TensorDescriptor", lambda *a: made.append(a) or kernel(*a))
    config = StemConfig(block_size=128, budget_ratio=0.0, budget_bias=1, tail_blocks=0, local_blocks=1)
    parts = draw([(20, 300), (9, 9)], dim=64, dtype=torch.float16)
    expected = [alone(part, config=config, backend="triton") for part in parts]
    for page_size, copied in ((128, True), (64, True), (8, False)):
        made.clear()
        out = stem_attention_paged(**page_out(parts, page_size), config=config, backend="triton")
        assert bool(made) == copied
        assert torch.equal(out, torch.cat(expected))


def test_odd_page_sizes(backend: str) -> None:
    parts = draw([(20, 110), (9, 9)], dim=32)
    for page_size in (7, 272):
        out = stem_attention_paged(**page_out(parts, page_size), config=SMALL, backend=backend)
        expected = torch.cat([alone(part, config=SMALL, backend=backend) for part in parts])
        assert torch.equal(out, expected)


def test_pages_beyond_32_bits() -> None:
    """A page that lies more than 2^31 numbers from page 0 (the memory between them is never touched)."""
    (part,) = draw([(40, 100)], dim=64, dtype=torch.float16)
    inputs = page_out([part], 64)
    apart = (1 << 31) // 6 + 64
    pages = inputs["k_cache"].shape[0]
    assert apart * pages > 1 << 31 or pages < 7
    pytest.importorskip("triton")
    expected = stem_attention_paged(**inputs, config=SMALL, backend="triton")
    for name in ("k_cache", "v_cache"):
        cache = inputs[name]
        far = torch.empty(7 * apart, dtype=cache.dtype, device=cache.device)
        view = far.as_strided((7, *cache.shape[1:]), (apart, 64, 64, 1))
        where = torch.tensor([6, 0, 5, 1, 4])[: len(cache)]
        for page, to in enumerate(where.tolist()):
            view[to] = cache[page]
        inputs[name] = view
    table = inputs["block_table"]
    table[0, :2] = where[table[0, :2].long().cpu()].to(table)
    assert torch.equal(stem_attention_paged(**inputs, config=SMALL, backend="triton"), expected)


@pytest.mark.parametrize(("size", "page_size"), [(128, 16), (128, 128), (64, 16)])
def test_all_blocks_if_a_flag_on_the_device_says_so(size: int, page_size: int, backend: str) -> None:
    """What an audit asks for: and otherwise not one number is written."""
    dim, dtype = (128, torch.float16) if GPU else (32, torch.float32)
    inputs = page_out(draw([(150, 300)], dim=dim, dtype=dtype), page_size)
    call = Call(Layout.paged(*inputs.values()), size, dim**-0.5)
    out = torch.full((150, 2, dim), 7.0, dtype=dtype, device=DEVICE)
    for wanted in (False, True):
        by_name(backend).attend_if(call, torch.tensor(wanted, device=DEVICE), out.transpose(0, 1)[None])
        if not wanted:
            assert (out == 7).all()
    config = StemConfig(block_size=size, budget_ratio=1.0, decay=1.0)
    assert torch.equal(out, stem_attention_paged(**inputs, config=config, backend=backend))


def test_writes_into_the_given_output(backend: str) -> None:
    parts = draw([(40, 100), (9, 9)], dim=32)
    inputs = page_out(parts, 16)
    expected = stem_attention_paged(**inputs, config=SMALL, backend=backend)
    wide = torch.full((60, 2, 40), 7.0, device=DEVICE)
    out = wide[:49, :, :32]
    assert stem_attention_paged(**inputs, config=SMALL, backend=backend, out=out) is out
    assert torch.equal(out, expected)
    assert (wide[49:] == 7).all()
    assert (wide[..., 32:] == 7).all()


def test_lengths_may_be_tensors() -> None:
    parts = draw([(40, 100), (9, 9)], dim=32)
    inputs = page_out(parts, 16)
    expected = stem_attention_paged(**inputs, config=SMALL)
    for name in ("cu_seqlens_q", "seq_lens"):
        inputs[name] = torch.tensor(inputs[name], dtype=torch.int32, device=DEVICE)
    assert torch.equal(stem_attention_paged(**inputs, config=SMALL, prompt_len=inputs["seq_lens"]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 49, 32)}, "q must be a tensor"),
        ({"k_cache": torch.zeros(9, 16, 32)}, "k_cache must be a tensor"),
        ({"v_cache": torch.zeros(9, 16, 3, 32)}, "agree in pages, page_size and heads"),
        ({"k_cache": torch.zeros(10, 16, 32, 1).transpose(2, 3)}, "last stride of 1"),
        ({"block_table": torch.zeros(2, 7, dtype=torch.int64)}, "block_table must be int32"),
        ({"block_table": torch.zeros(2, 6, dtype=torch.int32)}, "2 rows, one a sequence, of at least 7 pages"),
        ({"block_table": torch.zeros(3, 7, dtype=torch.int32)}, "2 rows"),
        ({"cu_seqlens_q": [0, 40, 48]}, "from 0 to 49 tokens"),
        ({"seq_lens": [100]}, "seq_lens must be 2 ints"),
        ({"seq_lens": [100, 8]}, "more tokens than k"),
        ({"prompt_len": [99, 9]}, "sequence 0 has 100, and got 99"),
        ({"out": torch.zeros(49, 2, 16)}, "out must be"),
        ({"out": torch.zeros(49, 32, 2).transpose(1, 2)}, "last stride of 1"),
        ({"q": torch.zeros(49, 2, 32, dtype=torch.float16)}, "share one floating dtype"),
        ({"config": 3}, "config must be a StemConfig or a preset"),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, object], message: str) -> None:
    inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in _small_inputs().items()}
    with pytest.raises(ValueError, match=message):
        stem_attention_paged(**{**inputs, "config": SMALL, **change})


def _small_inputs() -> dict[str, object]:
    return page_out(draw([(40, 100), (9, 9)], dim=32), 16)
