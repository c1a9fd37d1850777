"""Kernels compiled ahead: on a GPU nothing is compiled after it; elsewhere, which calls it makes."""

import sys

import pytest
import torch

import stem_attn
from stem_attn import (
    PagedPrefill,
    StemConfig,
    backends,
    block_sparse_attention,
    run,
    stem_attention,
    stem_attention_paged,
    warm_up,
)
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.warm_up import _calls

SHAPE = {"query_heads": 4, "kv_heads": 2, "head_dim": 64}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_calls_cover_every_power_of_two_of_blocks():
    calls = set(_calls(1000, 300, 64))
    assert {k_len for _, k_len in calls} == {1000, 904, 512, 416, 256, 160, 128, 32, 64}
    assert {(300, 1000), (65, 1000), (300, 416), (65, 416), (256, 256), (65, 256), (32, 32)} <= calls
    assert all(0 < q_len <= min(300, k_len) for q_len, k_len in calls)
    assert set(_calls(5, 5, 64)) == {(5, 5)}


@pytest.mark.parametrize("page_size", [None, 16])
def test_it_runs_on_a_cpu(page_size):
    config = StemConfig(block_size=16, stride=4)
    warm_up(**SHAPE, max_len=100, chunk=40, page_size=page_size, config=config, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query_heads": 4.0}, "query_heads must be an int of at least 1, got 4.0"),
        ({"max_len": 0}, "max_len must be an int of at least 1, got 0"),
        ({"page_size": 0}, "page_size must be an int of at least 1, got 0"),
        ({"window": 0}, "window must be an int of at least 1, got 0"),
        ({"page_size": 16, "window": 64}, "window=64 and page_size=16: pages are not attended to in bands"),
        ({"kv_heads": 3}, "multiple of KV heads, got 4 and 3"),
        ({"config": "none"}, "none"),
        ({"softcap": -1.0}, "softcap"),
        ({"page_size": 16, "softcap": -1.0}, "softcap"),
        ({"sinks": torch.int32}, "sinks"),
        ({"page_size": 16, "sinks": torch.int32}, "sinks"),
        ({"backend": "none"}, "none"),
        ({"device": "cuda:99"}, "cannot use device 'cuda:99': "),
        ({"device": torch.device("cuda", 99)}, "cannot use device 'cuda:99': "),
        ({"device": "toaster"}, "cannot use device 'toaster': Expected one of"),
        ({"device": None}, "cannot use device 'None': "),
        ({"device": "meta"}, "q, k and v must hold numbers"),
        ({"audit_rows": -1}, "audit_rows"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        warm_up(**{**SHAPE, "max_len": 64, "device": "cpu", **given})


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("page_size", [None, 16, 128])
@pytest.mark.parametrize("preset", ["default", "official", "with means"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("sinks", [None, torch.bfloat16])
def test_nothing_is_compiled_after_it(page_size, preset, softcap, sinks, monkeypatch):
    import triton

    if preset == "with means":
        preset = StemConfig(residual="mean")

    heads, kv_heads, dim, longest, chunk = 8, 2, 128, 70_000, 4096
    shape = {"query_heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    warm_up(**shape, max_len=longest, chunk=chunk, page_size=page_size, config=preset, softcap=softcap, sinks=sinks)
    tensor = None if sinks is None else torch.zeros(heads, dtype=sinks, device="cuda")
    asked = {"config": preset, "softcap": softcap, "sinks": tensor}
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs))
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [(70_000, 4096), (66_001, 465), (33_333, 4096), (20_480, 4096), (9001, 809), (2049, 2049), (300, 300)]
    for k_len, q_len in lengths:
        q = torch.randn(q_len, heads, dim, generator=generator, device="cuda").bfloat16()
        kv = torch.randn(k_len, kv_heads, 2 * dim, generator=generator, device="cuda").bfloat16()
        if page_size is None:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, *kv.split(dim, -1)))
            stem_attention(q, k, v, **asked)
        else:
            pages = -(-k_len // page_size)
            cache = torch.zeros(pages * page_size, kv_heads, 2 * dim, dtype=q.dtype, device="cuda")
            cache[:k_len] = kv
            k, v = cache.view(pages, page_size, kv_heads, 2 * dim).split(dim, -1)
            table = torch.arange(pages, dtype=torch.int32, device="cuda")[None]
            stem_attention_paged(q, k, v, cu_seqlens_q=[0, q_len], seq_lens=[k_len], block_table=table, **asked)
            prefill = PagedPrefill(cu_seqlens_q=[0, q_len], seq_lens=[k_len], block_table=table)
            for _ in range(2):
                prefill.run(q, k, v, out=torch.empty_like(q), **asked)
            short = {"cu_seqlens_q": [0, 1, 131, 260, 300], "seq_lens": [k_len, k_len // 2, 300, 300]}
            if q_len >= 300:
                stem_attention_paged(q[:300], k, v, **short, block_table=table.expand(4, -1).contiguous(), **asked)
    assert [kwargs["repr"] for kwargs in compiled] == []


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("sinks", [None, torch.bfloat16])
def test_no_band_is_compiled_after_it(sinks, monkeypatch):
    import triton

    warm_up(**SHAPE, max_len=20_000, window=1024, sinks=sinks)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs))
    asked = {} if sinks is None else {"sinks": torch.zeros(4, dtype=sinks, device="cuda")}
    for q_len, k_len in [(20_000, 20_000), (4096, 16_384), (9001, 9001), (300, 300)]:
        q = torch.randn(1, 4, q_len, 64, device="cuda").bfloat16()
        k, v = (torch.randn(1, 2, k_len, 64, device="cuda").bfloat16() for _ in range(2))
        sizes = {"block_size": 128, "q_len": q_len, "k_len": k_len, "window": 1024}
        band = BlockSelection.band(batch=1, heads=4, device="cuda", **sizes)
        block_sparse_attention(q, k, v, band, window=1024, **asked)
    assert [kwargs["repr"] for kwargs in compiled] == []


@GPU
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper's")
@pytest.mark.parametrize("page_size", [None, 16])
def test_nothing_of_8_bits_is_compiled_after_it(page_size, monkeypatch):
    import triton

    config = StemConfig(precision="fp8")
    heads, kv_heads, dim = 8, 2, 128
    warm_up(query_heads=heads, kv_heads=kv_heads, head_dim=dim, max_len=40_000, page_size=page_size, config=config)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs))
    for q_len, k_len in [(40_000, 40_000), (4096, 33_333), (9001, 9001), (300, 300)]:
        q = torch.randn(q_len, heads, dim, device="cuda").bfloat16()
        k, v = (torch.randn(-(-k_len // 16) * 16, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
        if page_size is None:
            stem_attention(*(x.transpose(0, 1)[None] for x in (q, k[:k_len], v[:k_len])), config=config)
        else:
            k, v = (x.view(-1, 16, kv_heads, dim) for x in (k, v))
            table = torch.arange(len(k), dtype=torch.int32, device="cuda")[None]
            sequences = {"cu_seqlens_q": [0, q_len], "seq_lens": [k_len], "block_table": table}
            stem_attention_paged(q, k, v, **sequences, config=config)
    assert [kwargs["repr"] for kwargs in compiled] == []


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("sinks", [None, torch.bfloat16])
def test_no_audit_is_compiled_after_it(page_size, sinks, monkeypatch):
    import triton

    warm_up(**SHAPE, max_len=20_000, page_size=page_size, sinks=sinks, audit_rows=320)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs))
    asked = {} if sinks is None else {"sinks": torch.zeros(4, dtype=sinks, device="cuda")}
    for length in (20_000, 16_384, 9001, 300):
        q, k, v = (torch.randn(1, heads, length, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
        layout = Layout.dense(q, k, v)
        if page_size is not None:
            pages = -(-length // page_size)
            cache = torch.zeros(pages * page_size, 2, 128, dtype=q.dtype, device="cuda")
            cache[:length] = torch.cat((k, v), 3)[0].transpose(0, 1)
            k, v = cache.view(pages, page_size, 2, 128).split(64, -1)
            table = torch.arange(pages, dtype=torch.int32, device="cuda")[None]
            layout = Layout.paged(q[0].transpose(0, 1).contiguous(), k, v, [0, length], [length], table)
        call = Call(layout, 128, 0.125, **asked)
        out, kept = run.prefill(call, StemConfig(), "auto")
        backend = backends.for_call("auto", call)
        sums = run.audit(call, kept, out, backend, rows=320, seed=1)
        for target in ((0.9, None), (None, 0.4)):
            backend.attend_if(call, backend.misses(sums.values, sums.queries, sums.rows, *target), out)
    assert [kwargs["repr"] for kwargs in compiled] == []


def test_bands_are_warmed_up_where_they_are_asked_for(monkeypatch):
    windows = []
    attend = block_sparse_attention
    monkeypatch.setattr(
        sys.modules[warm_up.__module__],
        "block_sparse_attention",
        lambda *x, **how: windows.append(how["window"]) or attend(*x, **how),
    )
    shape = {**SHAPE, "max_len": 100, "dtype": torch.float32, "device": "cpu"}
    warm_up(**shape)
    assert windows == []
    warm_up(**shape, window=40)
    assert set(windows) == {40}


@pytest.mark.parametrize("page_size", [None, 16])
def test_audits_are_warmed_up_where_they_are_asked_for(page_size, monkeypatch):
    audited, audit = [], run.audit
    monkeypatch.setattr(
        run, "audit", lambda call, *args, **how: audited.append((call, how)) or audit(call, *args, **how)
    )
    shape = {**SHAPE, "max_len": 100, "page_size": page_size, "config": StemConfig(block_size=16, stride=4)}
    warm_up(**shape, dtype=torch.float32, device="cpu")
    assert audited == []
    warm_up(**shape, dtype=torch.float32, device="cpu", audit_rows=24)
    assert len(audited) == len(list(_calls(100, 100, 16)))
    assert {how["rows"] for _, how in audited} == {24}
    assert {call.layout.page_size for call, _ in audited} == {page_size or 0}


def test_it_is_public():
    assert "warm_up" in stem_attn.__all__
