"""Sampled rows that are attended exactly, against all rows in float64."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from helpers import SMALL, make_qkv
from stem_attn import BlockSelection, backends, block_sparse_attention, run, stem_attention
from stem_attn.audit import AuditSums, audit, rows_to_show
from stem_attn.backends.triton import TritonBackend
from stem_attn.blocks import BlockGrid
from stem_attn.call import Call
from stem_attn.layout import Layout


def truth(call, part, selection, out):
    """Recall and error over all rows of a part, at token level in float64."""
    k, v = (x.double().repeat_interleave(part.q.shape[1] // part.k.shape[1], 1) for x in part.gather())
    grid = call.grid(part)
    query, key = torch.arange(grid.offset, part.k_len)[:, None], torch.arange(part.k_len)
    hidden = key > query
    if call.window is not None:
        hidden |= key <= query - call.window
    logits = part.q.double() @ k.mT * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(hidden, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.double()[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    share = logits.softmax(-1)[..., : part.k_len]
    blocks = selection.to_mask()[:, :, query[:, 0] // call.block_size - grid.first_block]
    kept = blocks.repeat_interleave(call.block_size, -1)[..., : part.k_len]
    exact = share @ v
    return float(((share * kept).sum(-1) / share.sum(-1)).mean()), float((out.double() - exact).norm() / exact.norm())


def sparse(q, k, v, config=SMALL):
    out, selection = stem_attention(q, k, v, config=config, return_selection=True)
    return Call(Layout.dense(q, k, v), config.block_size, q.shape[3] ** -0.5), selection, out


def all_rows(call, selections, out):
    """An audit whose strata are single queries: both rows of a cell are that query, so nothing is left to chance."""
    rows = 2 * call.q.shape[1] * max(part.q_len for part in call.parts)
    return audit(call, selections, out, rows=rows, seed=0).read()


@pytest.fixture
def every_query(monkeypatch):
    monkeypatch.setattr("stem_attn.audit._QUERIES_A_CELL", 1)


@pytest.mark.parametrize(
    ("q_len", "k_len", "options"),
    [
        (111, None, {}),
        (64, None, {"heads": 6, "kv_heads": 1}),
        (129, 300, {"v_dim": 12}),
        (100, 161, {"batch": 2, "heads": 3, "kv_heads": 3}),
        (129, None, {"dtype": torch.bfloat16}),
        (63, 250, {"dtype": torch.float64}),
    ],
)
@pytest.mark.usefixtures("every_query")
def test_with_every_query_it_is_the_truth(q_len, k_len, options):
    call, selection, out = sparse(*make_qkv(q_len, k_len, **options))
    found = all_rows(call, [selection], out)
    recall, error = truth(call, call.parts[0], selection, out)
    assert found.recall.value == pytest.approx(recall, abs=1e-5)
    assert found.error.value == pytest.approx(error, rel=1e-3)


@pytest.mark.usefixtures("every_query")
def test_tiles_of_one_kv_head_change_nothing(monkeypatch):
    call, selection, out = sparse(*make_qkv(100, 130, batch=2))
    whole = audit(call, [selection], out, rows=50, seed=3).values
    monkeypatch.setattr("stem_attn.exact_rows._TILE_NUMBERS", 1)
    assert torch.allclose(audit(call, [selection], out, rows=50, seed=3).values, whole)


@pytest.mark.usefixtures("every_query")
def test_a_window_hides_old_keys():
    q, k, v = make_qkv(150, 200)
    grid = BlockGrid(150, 200, 16)
    recent = BlockSelection.band(batch=1, heads=4, window=20, block_size=16, q_len=150, k_len=200, device="cpu")
    out = block_sparse_attention(q, k, v, recent, window=40)
    call = Call(Layout.dense(q, k, v), 16, 32**-0.5, window=40)
    found = all_rows(call, [recent], out)
    recall, error = truth(call, call.parts[0], recent, out)
    assert found.recall.value == pytest.approx(recall, abs=1e-5)
    assert found.error.value == pytest.approx(error, rel=1e-3)
    everything = BlockSelection.everything(batch=1, heads=4, grid=grid, device="cpu")
    assert all_rows(call, [everything], out).recall.value == pytest.approx(1.0)


@pytest.mark.parametrize("tile", [2**24, 1])
@pytest.mark.parametrize(
    "asked", [{"softcap": 1.5}, {"sinks": [8.0, -3.0, 9.0, 7.0]}, {"softcap": 2.0, "sinks": [3.0] * 4}]
)
@pytest.mark.usefixtures("every_query")
def test_a_softcap_and_sinks_are_part_of_what_is_exact(asked, tile, monkeypatch):
    monkeypatch.setattr("stem_attn.exact_rows._TILE_NUMBERS", tile)
    q, k, v = make_qkv(129, 200)
    how = {name: torch.tensor(x) if name == "sinks" else x for name, x in asked.items()}
    out, selection = stem_attention(3 * q, k, v, config=SMALL, return_selection=True, **how)
    call = Call(Layout.dense(3 * q, k, v), 16, 32**-0.5, **how)
    found = all_rows(call, [selection], out)
    recall, error = truth(call, call.parts[0], selection, out)
    assert found.recall.value == pytest.approx(recall, abs=1e-5)
    assert found.error.value == pytest.approx(error, rel=1e-3)
    plain = all_rows(Call(Layout.dense(3 * q, k, v), 16, 32**-0.5), [selection], out)
    assert plain.error.value != pytest.approx(found.error.value, rel=0.05)
    everything = BlockSelection.everything(batch=1, heads=4, grid=call.grid(call.parts[0]), device="cpu")
    assert all_rows(call, [everything], out).recall.value == pytest.approx(1.0)


@pytest.mark.usefixtures("every_query")
def test_pages_and_packed_sequences_are_summed():
    lengths, page = [70, 130], 8
    q, k, v = make_qkv(200, heads=4, kv_heads=2)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    starts = [0, 70, 200]
    layout = Layout.packed(*packed, starts)
    parts = []
    for part in layout.parts:
        out, selection = stem_attention(part.q, part.k, part.v, config=SMALL, return_selection=True)
        parts.append((out, selection))
    out, kept = torch.cat([out for out, _ in parts], 2), [selection for _, selection in parts]
    call = Call(layout, 16, 32**-0.5)
    found = all_rows(call, kept, out)
    truths = [truth(call, p, s, o) for p, (o, s) in zip(call.parts, parts, strict=True)]
    expected = sum(n * recall for n, (recall, _) in zip(lengths, truths, strict=True)) / 200
    assert found.recall.value == pytest.approx(expected, abs=1e-5)

    pages = [-(-n // page) for n in lengths]
    table = torch.full((2, max(pages)), -1, dtype=torch.int32)
    table[0, : pages[0]] = torch.arange(pages[0]).flip(0)
    table[1, : pages[1]] = torch.arange(pages[1]) + pages[0]
    caches = []
    for x in packed[1:]:
        cache = torch.zeros(sum(pages), page, *x.shape[1:])
        for row, (start, stop) in enumerate(pairwise(starts)):
            for at in range(start, stop):
                cache[table[row, (at - start) // page], (at - start) % page] = x[at]
        caches.append(cache)
    paged = Call(Layout.paged(packed[0], *caches, starts, lengths, table), 16, 32**-0.5)
    assert torch.allclose(
        audit(paged, kept, out, rows=60, seed=1).values, audit(call, kept, out, rows=60, seed=1).values
    )


def uniform():
    q, k, v = make_qkv(1024)
    return q * 0, k, v


def random():
    q, k, v = make_qkv(1024)
    return 3 * q, k, v


def undervalued_needle():
    """Every query seeks one key whose block's mean points the other way, so that linear scores undervalue it."""
    q, k, v = make_qkv(1024)
    q[..., 0] = 8.0
    k[:, :, 320:336, 0] = -4.0
    k[:, :, 327, 0] = 9.0
    return q, k, v


@pytest.mark.parametrize("adversary", [uniform, random, undervalued_needle])
def test_the_interval_holds_the_truth_for_adversaries(adversary):
    call, selection, out = sparse(*adversary())
    recall, error = truth(call, call.parts[0], selection, out)
    assert recall < 0.8  # it is one
    held = torch.zeros(2)
    for seed in range(40):
        found = audit(call, [selection], out, rows=200, seed=seed).read()
        assert found.rows == 4 * 2 * (1024 // 128)  # no more than one query of 64
        held += torch.tensor([found.recall.low <= recall <= found.recall.high, found.error.low <= error])
    assert held.tolist() >= [36, 36]


def test_what_no_row_has_shown_is_not_ruled_out():
    """One block of queries loses nearly all, and many samples miss it: the lower limit must not."""
    q, k, v = make_qkv(4096, heads=1, kv_heads=1)
    q[:, :, 2000:2048, 0] = 30.0
    k[:, :, :16, 0] = 30.0
    v = v * 0 + 1
    v[:, :, :16] = -1
    mask = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    mask[:, :, 125:128, 0] = False
    selection = BlockSelection.from_mask(mask, block_size=16, q_len=4096, k_len=4096)
    out = block_sparse_attention(q, k, v, selection)
    call = Call(Layout.dense(q, k, v), 16, 32**-0.5)
    recall, error = truth(call, call.parts[0], selection, out)
    assert recall == pytest.approx(1 - 48 / 4096, abs=1e-3)
    found = [audit(call, [selection], out, rows=64, seed=seed).read() for seed in range(20)]
    assert sum(x.recall.value > 0.9999 for x in found) > 5  # many saw nothing
    assert all(x.recall.low <= recall <= x.recall.high and error <= x.error.high for x in found)


def test_the_interval_is_about_that_of_clopper_and_pearson_where_rows_are_kept_or_lost_wholly():
    limits = {0: 3.69, 2: 7.22, 5: 11.67, 10: 18.39}  # of many rows, how many may be lost if so many of them were
    for lost, limit in limits.items():
        rows, queries = 2000, 2000.0
        # A cell of two rows, one of them lost.
        variance, squares = lost * 1.0, lost * 1.0
        sums = torch.tensor([queries - lost, variance, squares, 0, 0, 0, 0], dtype=torch.float64)
        low = AuditSums(2000, rows, sums).read().recall.low
        assert (1 - low) * rows == pytest.approx(limit, rel=0.15)


def test_sums_of_calls_are_those_of_all_their_rows():
    first, second = sparse(*make_qkv(512)), sparse(*make_qkv(1024, seed=1))
    parts = [audit(call, [s], out, rows=64, seed=n) for n, (call, s, out) in enumerate((first, second))]
    both = sum(parts[1:], parts[0])
    assert both.queries == 4 * (512 + 1024)
    assert both.rows == sum(part.rows for part in parts)
    recalls = [part.read().recall.value for part in parts]
    assert both.read().recall.value == pytest.approx((recalls[0] + 2 * recalls[1]) / 3)


def test_seeds_decide_and_global_randomness_is_left_alone():
    call, selection, out = sparse(*make_qkv(512))
    before = torch.get_rng_state()
    one, same, other = (audit(call, [selection], out, rows=64, seed=seed).values for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_automatic_choice_passes_over_is_counted_once_a_call(monkeypatch):
    """An audit looks for the backend of a call that has run, and has counted that already."""
    triton, load = TritonBackend(), backends._load
    monkeypatch.setattr(TritonBackend, "automatic_on", ("cpu",))
    monkeypatch.setattr(TritonBackend, "why_unsupported", lambda *_: "it is Sunday")
    monkeypatch.setattr(backends, "_load", lambda name: (triton, None) if name == "triton" else load(name))
    before = backends.fallbacks().get("triton: it is Sunday", 0)
    call, _, _ = sparse(*make_qkv(512))
    assert backends.for_call("auto", call, again=True).name == "cpu"
    assert backends.fallbacks()["triton: it is Sunday"] == before + 1


def test_an_audit_runs_on_the_backend_that_it_is_given(monkeypatch):
    call, selection, out = sparse(*make_qkv(512))
    backend = backends.by_name("cpu")
    assert torch.equal(
        run.audit(call, [selection], out, backend, rows=64, seed=0).values,
        audit(call, [selection], out, rows=64, seed=0).values,
    )
    monkeypatch.setattr(type(backend), "compare_rows", lambda *_: torch.ones(3, 1, 4, 8))
    found = run.audit(call, [selection], out, backend, rows=64, seed=0)
    assert found.values.tolist() == [2048.0, 0.0, 0.0, 2048.0, 2048.0, 0.0, 0.0]


def test_few_queries_have_two_rows_a_head():
    call, selection, out = sparse(*make_qkv(1, 300))
    found = audit(call, [selection], out, rows=1000, seed=0).read()
    recall, _ = truth(call, call.parts[0], selection, out)
    assert found.rows == 8
    assert found.recall.value == pytest.approx(recall, abs=1e-5)


def test_what_is_no_number_stays_so():
    q, k, v = make_qkv(256)
    q[0, 0] = math.nan
    call, selection, out = sparse(q, k, v)
    found = audit(call, [selection], out, rows=64, seed=0).read()
    assert math.isnan(found.recall.low)
    assert math.isnan(found.error.high)


def test_values_of_zero_have_no_error():
    q, k, v = make_qkv(256)
    call, selection, out = sparse(q, k, 0 * v)
    assert audit(call, [selection], out, rows=64, seed=0).read().error.high == 0.0


def test_rows_to_show_is_what_a_perfect_audit_needs():
    rows = rows_to_show(0.05)
    perfect = torch.tensor([1000.0, 0, 0, 0, 1.0, 0, 0], dtype=torch.float64)
    enough, few = AuditSums(1000, rows, perfect).read(), AuditSums(1000, rows - 1, perfect).read()
    assert enough.recall.low >= 0.95 > few.recall.low
    assert enough.error.high**2 <= 0.05 < few.error.high**2


def test_residual_means_lower_the_error_and_not_the_recall():
    q, k, v = make_qkv(512)
    call, selection, out = sparse(0.3 * q, k, v)
    with_means = block_sparse_attention(0.3 * q, k, v, selection, residual="mean")
    pruned, returned = (audit(replace(call), [selection], x, rows=64, seed=0).read() for x in (out, with_means))
    assert returned.recall == pruned.recall
    assert returned.error.high < pruned.error.value
