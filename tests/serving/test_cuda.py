"""The CUDA backend's classes on a CPU, over the steps of a real CPU engine.

vLLM's metadata, block tables and slots, and every layer's queries, keys and values are the engine's. Simulated are the
cache in CUDA's layout, which is filled through the slots, and FlashAttention, which is plain SDPA over that cache; the
kernels run in Triton's interpreter. No GPU and no CUDA build of vLLM took part.
"""

import copy
import os
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import SPARSE, attention_layers, builders, config_of, engine, relative_error, runner, sampling, set_chunk
from tiny_families import prompt, save

from stem_attn import budget, stem_attention
from stem_attn.integrations.vllm.settings import CHOOSER

PAGE = 32
LAYERS = 4  # from the third sparse one of a step on, attention is launched and nothing else
# Prompts, and what they ask for. A step holds sparse, short, dense and decoded rows, and budgets of several scales.
PROMPTS = {502: None, 33: None, 300: 3, 133: "dense", 260: 2, 41: None, 90: None, 150: None}
SETTINGS = {**SPARSE, "min_seq_len": 64, "dense_layers": [0], "depth_decay": 0.3}


@dataclass
class Step:
    """What one step of the engine gave a metadata builder, and what it made of it."""

    common: Any
    told: Any  # what the runner knew of the requests; None: it was not asked
    layers: dict[str, tuple[torch.Tensor, ...]]  # query, key, value and output of each layer, token by token


def ask(llm):
    """Have all prompts answered."""
    wanted = [sampling(3, extra_args=x and {"stem": x}) for x in PROMPTS.values()]
    asked = [{"prompt_token_ids": prompt(n, n)} for n in PROMPTS]
    llm.generate(asked, wanted, use_tqdm=False)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Run an engine and keep its steps; yield them with its config, a builder's spec and the layers' names."""
    folder = save("llama", tmp_path_factory.mktemp("deeper"), num_hidden_layers=LAYERS)
    options = {"max_num_batched_tokens": 512, "block_size": PAGE, "enable_prefix_caching": False}
    with engine(folder, SETTINGS, logits_processors=[CHOOSER], **options) as llm:
        set_chunk(llm, 203)
        (builder,) = builders(llm)
        build, tell = builder.build, builder._requests.of
        recorded = []

        def record_build(common_prefix_len, common_attn_metadata, *args, **kwargs):
            common = common_attn_metadata
            made = build(common_prefix_len, common, *args, **kwargs)
            told = tell(common) if common.is_prefilling.any() else None
            recorded.append(Step(copy.deepcopy(common), told, {}))
            return made

        builder.build = record_build
        handles = []
        for name, layer in attention_layers(llm).items():

            def record(module, args, kwargs, output, name=name):
                q, k, v = (*args, *kwargs.values())[:3]
                heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads, module.num_heads)
                parts = zip((q, k, v, output), heads, strict=True)
                recorded[-1].layers[name] = tuple(x.detach().clone().view(-1, n, module.head_size) for x, n in parts)

            handles.append(layer.register_forward_hook(record, with_kwargs=True))
        ask(llm)
        for handle in handles:
            handle.remove()
        builder.build = build
        yield recorded, runner(llm).vllm_config, builder.kv_cache_spec, builder.layer_names


def dense_forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest):
    """FlashAttention over the paged cache, in plain SDPA: one request at a time, causal, lower right."""
    by_token = kv_cache.transpose(1, 2)
    starts = attn_metadata.query_start_loc.tolist()
    for n, (start, stop) in enumerate(pairwise(starts)):
        length = int(attn_metadata.seq_lens[n])
        pages = attn_metadata.block_table[n, : -(-length // PAGE)].long()
        tokens = by_token[pages].flatten(0, 1)[:length]
        k, v = (x.transpose(0, 1) for x in tokens.split(self.head_size, -1))
        seen = torch.ones(stop - start, length, dtype=torch.bool).tril(length - (stop - start))
        out = F.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1), k, v, attn_mask=seen, scale=self.scale, enable_gqa=True
        )
        output[start:stop] = out.transpose(0, 1)
    assert attn_metadata.scheduler_metadata is None
    return output


@pytest.fixture
def cuda(monkeypatch):
    """The module under test, with what needs a GPU replaced."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is not on")
    from stem_attn.integrations.vllm import cuda

    monkeypatch.setattr(cuda.FlashAttentionImpl, "forward", dense_forward)
    return cuda


def make_impl(cuda, head_size=32, window=None):
    return cuda.StemCudaImpl(4, head_size, head_size**-0.5, 2, None, window, "auto")


def make_builder(cuda, steps, monkeypatch, windows=(None,) * LAYERS):
    """Give the recorded engine's layers attention of the module under test; return it by layer, and their builder."""
    from vllm.config import set_current_vllm_config

    _, config, spec, names = steps
    layers = config.compilation_config.static_forward_context
    with set_current_vllm_config(config):
        impls = {name: make_impl(cuda, window=window) for name, window in zip(names, windows, strict=True)}
        for name, impl in impls.items():
            monkeypatch.setattr(layers[name], "impl", impl)
        return impls, cuda.StemCudaBuilder(spec, names, config, torch.device("cpu"))


@pytest.fixture
def prepared(monkeypatch):
    """Of every call that was made by launches found before: whether it could be."""
    from stem_attn.backends.triton.prepared import TritonPreparedCall

    made, run = [], TritonPreparedCall.run

    def record(self, *args):
        counts = run(self, *args)
        made.append(counts is not None)
        return counts

    monkeypatch.setattr(TritonPreparedCall, "run", record)
    return made


def test_replayed_steps_give_what_the_cpu_engine_gave(steps, cuda, prepared, monkeypatch):
    recorded, _, _, names = steps
    impls, builder = make_builder(cuda, steps, monkeypatch)
    scales = [config and config.budget_scale for config in (impls[name].config_of(builder._settings) for name in names)]
    assert scales[0] is None
    assert len(set(scales[1:])) == LAYERS - 1
    pages = 1 + max(int(step.common.block_table_tensor.max()) for step in recorded)
    caches = {name: torch.full((pages, 2, PAGE, 64), torch.nan) for name in names}
    # As on a server that has had prompts of all these scales: then the first layer makes the budgets of all.
    monkeypatch.setattr(budget, "_kept", {})
    seen, alone, chosen = set(), 0, set()
    for step in recorded:
        builder._requests.of = lambda common, told=step.told: told
        metadata = builder.build(0, step.common)
        plan = metadata.plan.get(impls[names[1]])
        assert impls[names[0]] not in metadata.plan
        seen.add((plan is not None, plan is not None and plan.rest is not None))
        runs = [] if plan is None else [one.run for one in plan.runs]
        alone += sum(len(run.spans) == 1 for run in runs)
        chosen.add(tuple(run.settings.config.budget_scale for run in runs))
        for name in names:
            query, key, value, expected = step.layers[name]
            tokens = step.common.num_actual_tokens
            slots = step.common.slot_mapping[:tokens]
            # [pages, Hkv, page, 2 D], as CUDA keeps it
            caches[name][slots // PAGE, :, slots % PAGE] = torch.cat([key, value], -1)[:tokens]
            output = torch.full_like(query, torch.nan)
            impls[name].forward(None, query, key, value, caches[name], metadata, output)
            assert relative_error(output[:tokens], expected[:tokens]) < 1e-5
    assert seen >= {(True, True), (True, False), (False, False)}  # prompts with decodes, alone, and decodes alone
    assert chosen >= {(), (1.0,), (2.0,), (3.0,)}
    assert any(len(runs) > 1 for runs in chosen)
    assert prepared == [True] * alone * (LAYERS - 2)


def test_a_step_of_decodes_counts_its_tokens_and_not_what_pads_it(steps, cuda, monkeypatch):
    from stem_attn.integrations.vllm.counters import counters

    recorded = steps[0]
    _, builder = make_builder(cuda, steps, monkeypatch, windows=(16, *[None] * (LAYERS - 1)))
    common = next(step.common for step in recorded if not step.common.is_prefilling.any())
    rows, starts = len(common.is_prefilling), common.query_start_loc_cpu
    padded = torch.cat([starts, starts[-1:].repeat(3)])
    given = [common.replace(query_start_loc_cpu=x, num_actual_tokens=rows + 3) for x in (starts, padded)]
    counters.reset()
    for step in given:  # what CUDA graphs record
        assert not hasattr(builder.build_for_cudagraph_capture(step), "plan")
    assert counters.read()["dense_tokens"] == {}
    builder._requests.of = lambda common: pytest.fail("the runner was asked")
    for step in given:
        counters.reset()
        assert builder.build(0, step).plan == {}
        assert counters.read()["dense_tokens"] == {"decode": rows * (LAYERS - 1), "sliding window": rows}


def test_what_this_vllm_lacks_of_optional_parts_is_said_as_an_engine_starts(steps, cuda, monkeypatch):
    from vllm.config import set_current_vllm_config

    from stem_attn.integrations.vllm import builder, compat

    _, config, spec, names = steps
    said = []
    monkeypatch.setattr(builder.logger, "warning_once", lambda words, *given: said.append(words % given))

    def allows_choice():
        with set_current_vllm_config(config):
            return cuda.StemCudaBuilder(spec, names, config, torch.device("cpu"))._per_request

    assert allows_choice()
    assert said == []
    lacks = {"V1 runner": (), "V2 runner": (), "requests": ("a.b is gone", "a takes no c")}
    for module in (builder, compat):
        monkeypatch.setattr(module, "lacks", lacks.get)
    assert not allows_choice()
    words = (
        f"stem-attn does without a part of this vLLM, {compat.VLLM_VERSION}: a.b is gone; a takes no c: requests have"
    )
    assert said == [f"{words} the server's settings"]


def test_an_image_makes_its_steps_dense_and_the_chance_of_one_does_not(steps):
    from stem_attn.integrations.vllm.builder import _why_all_dense

    common = steps[0][0].common
    # What vLLM tells of models whose images are seen as a whole: a list a request, empty where it has none.
    assert _why_all_dense(common.replace(mm_req_doc_ranges={0: [], 1: []})) is None
    assert _why_all_dense(common.replace(mm_req_doc_ranges={0: [], 1: [(3, 9)]})) == "multimodal prefix"


def one_run(cuda, span, block_table):
    """Return a span as a layer's `attend` takes it."""
    from stem_attn.integrations.vllm.plan import runs_of

    common = SimpleNamespace(block_table_tensor=block_table)
    return [cuda.StemCudaBuilder.run_of(None, run, common) for run in runs_of([span])]


def test_softcap_and_sinks_reach_the_kernels(steps, cuda):
    from vllm.config import set_current_vllm_config

    from stem_attn.integrations.vllm.plan import Span
    from stem_attn.integrations.vllm.settings import parse

    tokens, dim = 300, 32
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, tokens, dim, generator=random) for heads in (4, 2, 2))
    with set_current_vllm_config(steps[1]):
        impl = cuda.StemCudaImpl(4, dim, dim**-0.5, 2, None, None, "auto", 3.0)
    impl.sinks = torch.tensor([0.0, 1.0, 5.0, -1.0])  # which FlashAttention refuses to be made with here
    impl.name, impl.layers = "model.layers.1.self_attn.attn", 2
    cache = torch.zeros(10, PAGE, 2, 2 * dim)
    cache.view(10 * PAGE, 2, 2 * dim)[:tokens] = torch.cat([k, v], -1).transpose(0, 1)
    metadata = SimpleNamespace(block_table=torch.arange(10, dtype=torch.int32)[None])
    out = torch.empty(tokens, 4, dim)
    runs = one_run(cuda, Span(0, 0, tokens, tokens, tokens, parse(SETTINGS)), metadata.block_table)
    impl.attend(None, q.transpose(0, 1).contiguous(), cache.transpose(1, 2), metadata, runs, out)
    got, inputs = out.transpose(0, 1)[None], (q[None], k[None], v[None])
    properties = {"softcap": 3.0, "sinks": impl.sinks}
    assert relative_error(got, stem_attention(*inputs, config=config_of(SETTINGS), **properties)) < 1e-5
    for name in properties:
        changed = {**properties, name: None}
        assert relative_error(got, stem_attention(*inputs, config=config_of(SETTINGS), **changed)) > 1e-3


@pytest.mark.parametrize("audit_rows", [0, 16])
def test_an_fp8_cache_is_read_with_its_scales(steps, cuda, monkeypatch, audit_rows):
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends import flash_attn

    from stem_attn.integrations.vllm.plan import Span
    from stem_attn.integrations.vllm.settings import parse

    tokens, dim, fp8 = 300, 32, torch.float8_e4m3fn
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, tokens, dim, generator=random).to(fp8) for heads in (4, 2, 2))
    # As the other platform's FlashAttention says of fp8.
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args, **kwargs: True)
    with set_current_vllm_config(steps[1]):
        impl = cuda.StemCudaImpl(4, dim, dim**-0.5, 2, None, None, "fp8")
        assert cuda.StemCudaImpl(4, dim, dim**-0.5, 2, None, None, "fp8_e5m2").dense_reason == "fp8_e5m2 KV cache"
    assert impl.dense_reason is None
    impl.name, impl.layers = "model.layers.1.self_attn.attn", 2
    cache = torch.zeros(11, PAGE, 2, 2 * dim, dtype=torch.uint8)  # vLLM's own dtype of it
    pages = torch.randperm(11, generator=random)[None, :10].int()
    by_token = torch.cat([k, v], -1).transpose(0, 1).contiguous().view(torch.uint8)
    slots = pages[0].repeat_interleave(PAGE)[:tokens] * PAGE + torch.arange(tokens) % PAGE
    cache.view(11 * PAGE, 2, 2 * dim)[slots] = by_token
    scales = {"_q_scale": torch.tensor(0.5), "_k_scale": torch.tensor(1.5), "_v_scale": torch.tensor([0.25, 3.0])}
    layer, metadata = SimpleNamespace(**scales), SimpleNamespace(block_table=pages)
    settings = parse({**SETTINGS, "audit_rows": audit_rows})
    runs = one_run(cuda, Span(0, 0, tokens, tokens, tokens, settings), pages)
    inputs = [x.float()[None] * scale.view(-1, 1, 1) for x, scale in zip((q, k, v), scales.values(), strict=True)]
    expected = stem_attention(*inputs, config=config_of(SETTINGS))
    for given in (q, inputs[0][0]):  # vLLM makes queries fp8 where FlashAttention wants them so
        out = torch.empty(tokens, 4, dim)
        impl.attend(layer, given.transpose(0, 1).contiguous(), cache.transpose(1, 2), metadata, runs, out)
        assert relative_error(out.transpose(0, 1)[None], expected) < 1e-5


@pytest.fixture
def two_sequences(steps, cuda):
    """A layer, and a step's batch of a decode, a whole prompt that keeps everything, and a chunk of a longer prompt.

    Yields a function that attends by some settings and returns the output, and the prompts' own q, k and v.
    """
    from vllm.config import set_current_vllm_config

    from stem_attn.integrations.vllm.counters import counters
    from stem_attn.integrations.vllm.plan import Span, runs_of
    from stem_attn.integrations.vllm.settings import parse

    dim, lengths = 32, ((64, 64), (150, 300))
    random = torch.Generator().manual_seed(0)
    pages = torch.randperm(13, generator=random).int()
    table = torch.zeros(3, 10, dtype=torch.int32)
    cache = torch.full((13, PAGE, 2, 2 * dim), torch.nan)
    query = torch.randn(1 + sum(q_len for q_len, _ in lengths), 4, dim, generator=random)
    inputs, start, used = [], 1, 0
    for row, (q_len, k_len) in enumerate(lengths, start=1):
        kv = torch.randn(k_len, 2, 2 * dim, generator=random)
        count = -(-k_len // PAGE)
        table[row, :count] = pages[used : used + count]
        slots = table[row].repeat_interleave(PAGE)[:k_len] * PAGE + torch.arange(k_len) % PAGE
        cache.view(13 * PAGE, 2, 2 * dim)[slots] = kv
        heads_first = (x.transpose(0, 1)[None] for x in (query[start : start + q_len], *kv.split(dim, -1)))
        inputs.append((slice(start, start + q_len), *heads_first))
        start, used = start + q_len, used + count
    with set_current_vllm_config(steps[1]):
        impl = make_impl(cuda, dim)
    impl.name, impl.layers = "model.layers.1.self_attn.attn", 2

    def attend(**settings):
        counters.reset()
        chosen, out = parse({**SETTINGS, **settings}), torch.full_like(query, torch.nan)
        spans = [
            Span(row, tokens.start, q.shape[2], k.shape[2], k.shape[2], chosen)
            for row, (tokens, q, k, _) in enumerate(inputs, start=1)
        ]
        common = SimpleNamespace(block_table_tensor=table)
        runs = [cuda.StemCudaBuilder.run_of(None, run, common) for run in runs_of(spans)]
        assert len(runs) == 1
        impl.attend(None, query, cache.transpose(1, 2), SimpleNamespace(block_table=table), runs, out)
        assert out[0].isnan().all()  # the decode is not this one's
        return out[1:], counters.read()

    return attend, inputs


def test_an_audit_of_pages_is_that_of_the_sequences(two_sequences):
    from stem_attn import audit
    from stem_attn.call import Call
    from stem_attn.layout import Layout

    attend, inputs = two_sequences
    plain, counts = attend()
    assert counts["audit"] == {}
    audited, counts = attend(audit_rows=32)
    assert relative_error(audited, plain) < 1e-6
    sums = []
    for seed, (tokens, q, k, v) in enumerate(inputs, start=1):
        out, kept = stem_attention(q, k, v, config=config_of(SETTINGS), return_selection=True)
        assert relative_error(audited[tokens.start - 1 : tokens.stop - 1].transpose(0, 1)[None], out) < 1e-5
        call = Call(Layout.dense(q, k, v), config_of(SETTINGS).block_size, 32**-0.5)
        sums.append(audit.audit(call, [kept], out, rows=32, seed=seed))
    expected = (sums[0] + sums[1]).read()
    assert expected.recall.value < 0.99
    (found,) = counts["audit"].values()
    assert list(counts["audit"]) == [1]
    assert found["rows"] == expected.rows
    for name in ("recall", "error"):
        estimate = getattr(expected, name)
        assert found[name] == pytest.approx([estimate.value, estimate.low, estimate.high], rel=1e-4)
    assert counts["redone"] == {}


def test_the_sequence_that_misses_its_target_is_attended_again(two_sequences, monkeypatch):
    monkeypatch.setattr("stem_attn.audit._QUERIES_A_CELL", 1)  # of few queries many rows, so that they can show it
    attend, inputs = two_sequences
    out, counts = attend(audit_rows=64, min_recall=0.9)
    assert counts["redone"] == {1: 1}
    (whole, *_), (chunk, q, k, v) = inputs
    assert counts["redone_tokens"] == {1: chunk.stop - chunk.start}
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    again = out[chunk.start - 1 :].transpose(0, 1)[None]
    assert relative_error(again, dense) < 1e-5
    assert relative_error(again, stem_attention(q, k, v, config=config_of(SETTINGS))) > 0.05
    sparse, counts = attend(audit_rows=64, min_recall=0.1)
    assert counts["redone"] == counts["redone_tokens"] == {}
    assert torch.equal(sparse[: whole.stop - 1], out[: whole.stop - 1])
    assert relative_error(sparse[chunk.start - 1 :], out[chunk.start - 1 :]) > 0.05


def test_what_the_kernels_cannot_do_is_known_at_startup(steps, cuda, monkeypatch):
    from vllm.config import set_current_vllm_config

    config = steps[1]
    with set_current_vllm_config(config):
        assert make_impl(cuda, 256).dense_reason is None
        assert make_impl(cuda, 512).dense_reason == "head size 512"
        monkeypatch.setitem(config.additional_config, "stem", {**SETTINGS, "block_size": 48})
        with pytest.raises(ValueError, match="block sizes are 16, 32, 64 and 128, got 48"):
            make_impl(cuda)
        monkeypatch.setitem(config.additional_config, "stem", {"precision": "fp8"})
        with pytest.raises(ValueError, match=r"with precision='fp8' it takes .* got torch\.float32"):
            make_impl(cuda)


def test_nothing_of_the_warm_up_stays_in_memory_that_sleep_mode_forgets(steps, cuda, monkeypatch):
    from stem_attn import fallbacks
    from stem_attn.backends.triton.keep_table import keep_table, keep_tables

    _, builder = make_builder(cuda, steps, monkeypatch)
    warmed = []

    def warm_up(*, config, device, **_):
        warmed.append(keep_table(budget.budget_of(config, (640,)), 1, device))
        fallbacks.note_on_device("triton: unsafe", torch.tensor(2, device=device))

    monkeypatch.setattr(fallbacks, "_counts", Counter())
    monkeypatch.setattr(cuda, "warm_up", warm_up)
    builder._warm_up([builder._settings])
    assert len(warmed) == 1
    assert keep_tables.cache_info().currsize == 0
    assert not fallbacks._on_devices
    assert fallbacks.counts() == {"triton: unsafe": 2}


def test_audits_are_warmed_up(steps, cuda, monkeypatch):
    from stem_attn.integrations.vllm.settings import parse

    _, builder = make_builder(cuda, steps, monkeypatch)
    warmed = []
    monkeypatch.setattr(cuda, "warm_up", lambda *, audit_rows, **_: warmed.append(audit_rows))
    for rows in (0, 16):
        builder._warm_up([parse({**SETTINGS, "audit_rows": rows})])
    assert warmed == [0, 16]


def test_where_stem_is_not_selected_the_builder_is_the_parents(steps, cuda, monkeypatch):
    from vllm.config import set_current_vllm_config

    from stem_attn.integrations.vllm import builder

    _, config, spec, names = steps
    monkeypatch.setattr(builder, "settings_of", lambda _: None)
    monkeypatch.setattr(cuda.StemCudaBuilder, "_init_reorder_batch_threshold", lambda *_, **__: pytest.fail("set"))
    monkeypatch.setattr(cuda.StemCudaBuilder, "_warm_up", lambda *_: pytest.fail("warmed up"))
    with set_current_vllm_config(config):
        cuda.StemCudaBuilder(spec, names, config, torch.device("cpu"))


def test_graphs_and_names(cuda):
    from vllm.v1.attention.backend import AttentionCGSupport

    from stem_attn.integrations.vllm.compat import names_backends

    backend, builder = cuda.StemCudaBackend, cuda.StemCudaBuilder
    assert backend.get_name() == ("STEM" if names_backends() else "CUSTOM")
    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
    assert not builder.supports_update_block_table
    assert not cuda.StemCudaImpl.supports_dcp
    assert not backend.supports_pcp()
    assert backend.get_builder_cls() is builder
