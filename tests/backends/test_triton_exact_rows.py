"""The kernels of an audit against plain torch in float64: on a GPU, or in Triton's CPU interpreter."""

import dataclasses
import math

import pytest
import torch

from helpers import SMALL, make_qkv
from stem_attn import BlockSelection, stem_attention
from stem_attn.audit import audit
from stem_attn.backends.triton import TritonBackend
from stem_attn.call import Call
from stem_attn.exact_rows import compare_rows
from stem_attn.layout import Layout

GPU = torch.cuda.is_available()
pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's

DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter has no bfloat16 products
BACKEND = TritonBackend()


def wide(call):
    """The same call in float64 on the host."""
    q, k, v = (x.cpu().double() for x in (call.q, call.k, call.v))
    sinks = None if call.sinks is None else call.sinks.cpu().double()
    return Call(
        Layout.dense(q, k, v), call.block_size, call.scale, window=call.window, softcap=call.softcap, sinks=sinks
    )


def sampled(batch, heads, q_len, rows, seed=0):
    gen = torch.Generator().manual_seed(seed)
    places = torch.randint(q_len, (batch, heads, rows), generator=gen)
    places[..., 0], places[..., -1] = 0, q_len - 1
    return places


def check(call, selection, rows=7):
    """The output is of another random draw than attention's, so that a power is more than rounding."""
    (part,) = call.parts
    batch, heads, q_len, _ = part.q.shape
    out = torch.randn(batch, heads, q_len, call.v.shape[3], generator=torch.Generator().manual_seed(5)).to(call.v)
    places = sampled(batch, heads, q_len, rows)
    found = BACKEND.compare_rows(call, part, selection, out, places.to(DEVICE)).cpu()
    true = wide(call)
    kept = BlockSelection.made(selection.indices.cpu(), selection.counts.cpu(), selection.grid)
    expected = compare_rows(true, true.parts[0], kept, out.cpu().double(), places)
    torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("q_len", "k_len", "options", "asked"),
    [
        (111, None, {}, {}),
        (64, None, {"heads": 6, "kv_heads": 1}, {}),
        (129, 300, {"v_dim": 12}, {}),
        (100, 161, {"batch": 2, "heads": 3, "kv_heads": 3}, {}),
        (40, 130, {"dtype": HALF}, {}),
        (111, 200, {}, {"window": 40}),
        (111, 200, {}, {"softcap": 1.5}),
        (90, 90, {"dtype": HALF}, {"sinks": [8.0, -3.0, 9.0, -math.inf], "softcap": 2.0}),
        (70, 70, {}, {"sinks": [200.0, -3.0, 9.0, 7.0]}),
        (1, 300, {}, {}),
    ],
)
def test_rows_are_those_of_plain_torch(q_len, k_len, options, asked):
    q, k, v = (x.to(DEVICE) for x in make_qkv(q_len, k_len, **options))
    how = {name: torch.tensor(x, device=DEVICE) if name == "sinks" else x for name, x in asked.items()}
    found = {name: x for name, x in how.items() if name != "window"}
    _, selection = stem_attention(3 * q, k, v, config=SMALL, backend="cpu", return_selection=True, **found)
    check(Call(Layout.dense(3 * q, k, v), SMALL.block_size, q.shape[3] ** -0.5, **how), selection)


@pytest.mark.parametrize("scale", [0.3, -0.2])
@pytest.mark.parametrize("size", [64, 128])
def test_large_blocks_and_scales_of_any_sign(size, scale):
    q, k, v = (x.to(DEVICE) for x in make_qkv(2 * size + 9, 3 * size + 9))
    config = dataclasses.replace(SMALL, block_size=size)
    _, selection = stem_attention(q, k, v, config=config, scale=scale, backend="cpu", return_selection=True)
    check(Call(Layout.dense(q, k, v), size, scale), selection)


def test_everything_kept_has_a_share_of_one():
    q, k, v = (x.to(DEVICE) for x in make_qkv(100, 130))
    call = Call(Layout.dense(q, k, v), 16, 32**-0.5)
    selection = BlockSelection.everything(batch=1, heads=4, grid=call.grid(call.parts[0]), device=DEVICE)
    out = torch.zeros_like(q)
    found = BACKEND.compare_rows(call, call.parts[0], selection, out, sampled(1, 4, 100, 9).to(DEVICE))
    torch.testing.assert_close(found[0], torch.ones_like(found[0]))


@pytest.mark.parametrize("page_size", [16, 32])
def test_pages(page_size):
    q, k, v = (x.to(DEVICE) for x in make_qkv(50, 150, heads=4, kv_heads=2))
    pages = -(-150 // page_size)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(2))
    caches = []
    for x in (k, v):
        cache = torch.full((pages + 1, page_size, 2, 32), torch.nan, device=DEVICE)
        for n, page in enumerate(order.tolist()):
            tokens = x[0, :, n * page_size : (n + 1) * page_size].transpose(0, 1)
            cache[page, : len(tokens)] = tokens
        caches.append(cache)
    table = order.int()[None].to(DEVICE)
    paged = Call(Layout.paged(q[0].transpose(0, 1), *caches, [0, 50], [150], table), 16, 32**-0.5)
    plain = Call(Layout.dense(q, k, v), 16, 32**-0.5)
    out, selection = stem_attention(q, k, v, config=SMALL, backend="cpu", return_selection=True)
    places = sampled(1, 4, 50, 6).to(DEVICE)
    found, expected = (BACKEND.compare_rows(c, c.parts[0], selection, out, places) for c in (paged, plain))
    assert torch.equal(found, expected)


def test_what_is_no_number_stays_so_and_reaches_no_other_head():
    q, k, v = (x.to(DEVICE) for x in make_qkv(100))
    q[0, 1] = math.nan
    out, selection = stem_attention(q, k, v, config=SMALL, backend="cpu", return_selection=True)
    call = Call(Layout.dense(q, k, v), 16, 32**-0.5)
    found = BACKEND.compare_rows(call, call.parts[0], selection, out, sampled(1, 4, 100, 5).to(DEVICE))
    assert found[:, 0, 1].isnan().all()
    assert found[:, 0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("sinks", [None, [0.0, -3.0, 9.0, -math.inf]])
def test_rows_that_see_no_logit_above_minus_infinity(sinks):
    """All of such a row goes to its sink: nothing is lost. Without one the softmax is 0 / 0."""
    q, k, v = (x.to(DEVICE) for x in make_qkv(40, 100))
    q, k = torch.ones_like(q), torch.full_like(k, -math.inf)
    how = {} if sinks is None else {"sinks": torch.tensor(sinks, device=DEVICE)}
    call = Call(Layout.dense(q, k, v), 16, 32**-0.5, **how)
    (part,) = call.parts
    selection = BlockSelection.everything(batch=1, heads=4, grid=call.grid(part), device=DEVICE)
    places = sampled(1, 4, 40, 5).to(DEVICE)
    found, expected = (
        f(call, part, selection, torch.zeros_like(q), places) for f in (BACKEND.compare_rows, compare_rows)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().all(-1).tolist() == [[[sinks is None] * 3 + [True]]] * 3


def test_an_audit_by_the_kernels_is_that_by_plain_torch():
    q, k, v = (x.to(DEVICE) for x in make_qkv(300))
    out, selection = stem_attention(q, k, v, config=SMALL, backend="cpu", return_selection=True)
    call = Call(Layout.dense(q, k, v), 16, 32**-0.5)
    by_kernel, by_torch = (
        audit(call, [selection], out, rows=64, seed=0, compare=compare).values
        for compare in (BACKEND.compare_rows, compare_rows)
    )
    torch.testing.assert_close(by_kernel, by_torch, rtol=1e-4, atol=1e-6)
