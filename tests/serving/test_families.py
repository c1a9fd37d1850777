"""Other families, and engines with options of their own: hybrids, speculation, preemption, tensor parallelism."""

from pathlib import Path

import pytest
import torch
from engines import (
    BLOCK,
    DENSE,
    KEEP_ALL,
    SPARSE,
    answer,
    attention_layers,
    config_of,
    core,
    engine,
    reconfigure,
    relative_error,
    sampling,
    stats,
    trace,
)
from tiny_families import WINDOW, greedy, prompt, save_eagle, save_lora

from stem_attn import stem_attention

pytestmark = pytest.mark.slow

PROMPTS = [prompt(n, seed) for seed, n in enumerate((700, 33, 512))]
PROMPT_TOKENS = sum(map(len, PROMPTS))
CPU_FLAGS = Path("/proc/cpuinfo").read_text().split()


@pytest.fixture
def tables(monkeypatch):
    """Of each engine, what the log is told of its layers: their attention, and why."""
    from stem_attn.integrations.vllm import builder

    told = []
    monkeypatch.setattr(builder, "table", lambda rows: told.append([row[1:] for row in rows]))
    return told


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_qwen3(folders, family):
    with engine(folders(family), KEEP_ALL) as llm:
        assert answer(llm, PROMPTS) == greedy(folders(family), PROMPTS, 8)
        assert stats(llm)["sparse_tokens"] == PROMPT_TOKENS * 2
        reconfigure(llm, SPARSE)
        seen = trace(llm, PROMPTS[0])
        expected = stem_attention(seen.q[0], seen.k[0], seen.v[0], config=config_of(SPARSE))
        assert relative_error(seen.out[0], expected) < 1e-5
        assert stats(llm)["density"] < 0.6


def test_lora(folders, tmp_path):
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, save_lora(tmp_path))
    asked = [{"prompt_token_ids": ids} for ids in PROMPTS]
    with engine(folders("llama"), KEEP_ALL, enable_lora=True, max_lora_rank=8) as llm:
        plain, found = answer(llm, PROMPTS), []
        for stem in (KEEP_ALL, DENSE):
            reconfigure(llm, stem)
            outs = llm.generate(asked, sampling(), use_tqdm=False, lora_request=adapter)
            found.append([list(out.outputs[0].token_ids) for out in outs])
            assert (stats(llm)["sparse_tokens"] == PROMPT_TOKENS * 2) == (stem is KEEP_ALL)
    assert found[0] == found[1] != plain


def test_gemma3_sliding_layers_stay_with_the_parent(folders):
    only_full = {"attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}, "attention_backend": None}
    with engine(folders("gemma3_text"), KEEP_ALL, **only_full) as llm:
        assert answer(llm, PROMPTS) == greedy(folders("gemma3_text"), PROMPTS, 8)
        counts = stats(llm)
        decoded = len(PROMPTS) * 7
        assert counts["sparse_tokens"] == PROMPT_TOKENS  # one layer of the two
        assert counts["dense_tokens"] == {"decode": decoded, "sliding window": PROMPT_TOKENS + decoded}
        reconfigure(llm, SPARSE)
        sparse = trace(llm, PROMPTS[0])
        assert stats(llm)["density"] < 0.6
        reconfigure(llm, DENSE)
        dense = trace(llm, PROMPTS[0])
        assert relative_error(sparse.out[0], dense.out[0]) == 0  # the sliding layer
        assert relative_error(sparse.out[1], dense.out[1]) > 0.01
        windows = [layer.sliding_window for layer in attention_layers(llm).values()]
        assert windows == [WINDOW, None]


@pytest.mark.parametrize("kinds", ["one kind of cache", "a cache for each kind"])
def test_chunked_attention_stays_with_the_parent(folders, kinds):
    # vLLM reads no weights of a dense Llama 4 that transformers wrote.
    options = {"load_format": "dummy", "disable_hybrid_kv_cache_manager": kinds == "one kind of cache"}
    with engine(folders("llama4_text"), KEEP_ALL, **options) as llm:
        kept = answer(llm, PROMPTS)
        counts = stats(llm)
        decoded = len(PROMPTS) * 7
        assert counts["sparse_tokens"] == PROMPT_TOKENS  # one layer of the two
        assert counts["dense_tokens"] == {"decode": decoded, "chunked attention": PROMPT_TOKENS + decoded}
        assert [layer.impl.dense_reason for layer in attention_layers(llm).values()] == ["chunked attention", None]
        reconfigure(llm, DENSE)
        assert answer(llm, PROMPTS) == kept


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_softcap_and_sinks(folders, family):
    with engine(folders(family), KEEP_ALL) as llm:
        first, full = (layer.impl for layer in attention_layers(llm).values())
        properties = full.properties
        assert (properties["softcap"] is None, properties["sinks"] is None) == (family == "gpt_oss", family == "gemma2")
        assert first.dense_reason == "sliding window"
        kept = answer(llm, PROMPTS)
        assert kept == greedy(folders(family), PROMPTS, 8)
        assert stats(llm)["sparse_tokens"] == PROMPT_TOKENS
        reconfigure(llm, SPARSE)
        seen = trace(llm, PROMPTS[0])
        q, k, v = seen.q[1], seen.k[1], seen.v[1]
        expected = stem_attention(q, k, v, config=config_of(SPARSE), scale=full.scale, **properties)
        assert relative_error(seen.out[1], expected) < 1e-5
        without = stem_attention(q, k, v, config=config_of(SPARSE), scale=full.scale)
        assert relative_error(seen.out[1], without) > 1e-3
        assert stats(llm)["density"] < 0.6


def test_gated_attention_with_wide_heads_beside_a_linear_layer(folders, tables):
    # vLLM's linear layers compute in bfloat16 only on CPUs: dense attention in the same engine is what to compare with.
    with engine(folders("qwen3_next"), KEEP_ALL, dtype="bfloat16", enable_prefix_caching=False) as llm:
        assert tables == [[("not Stem's", "QwenGatedDeltaNetAttention"), ("sparse", "")]]
        kept = answer(llm, PROMPTS)
        assert stats(llm)["sparse_tokens"] == PROMPT_TOKENS  # one layer of the two
        assert stats(llm)["dense_tokens"] == {"decode": len(PROMPTS) * 7}
        reconfigure(llm, DENSE)
        assert answer(llm, PROMPTS) == kept
        assert stats(llm)["sparse_tokens"] == 0
        reconfigure(llm, SPARSE)
        seen = trace(llm, PROMPTS[0])
        assert seen.q[0].shape[-1] == 256
        expected = stem_attention(seen.q[0], seen.k[0], seen.v[0], config=config_of(SPARSE))
        assert relative_error(seen.out[0], expected) < 0.01
        assert stats(llm)["density"] < 0.6


SPECULATION = {
    "ngram": {"num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1},
    "eagle": {"num_speculative_tokens": 2},
}


@pytest.mark.parametrize("method", SPECULATION)
def test_speculation_changes_no_token(folders, tmp_path, tables, method):
    # Prompts that repeat themselves, so that the drafts have something to find.
    prompts = [prompt(40, seed) * 18 for seed in range(2)]
    speculation = {"method": method, **SPECULATION[method]}
    if method == "eagle":
        speculation["model"] = save_eagle(tmp_path)
    with engine(folders("llama"), SPARSE, speculative_config=speculation, async_scheduling=False) as llm:
        drafts = [("not Stem's", "CPUAttentionBackendImpl")] if method == "eagle" else []
        assert tables[-1] == [("sparse", "")] * 2 + drafts  # with a head, of which the drafter asks once more
        with_drafts = answer(llm, prompts, new_tokens=24)
        counts = stats(llm)
        assert counts["sparse_tokens"] == 2 * sum(map(len, prompts))
        assert counts["dense_tokens"]["decode"] > 2 * 2 * 23  # drafts were verified
        reconfigure(llm, KEEP_ALL)
        assert answer(llm, prompts, new_tokens=24) == greedy(folders("llama"), prompts, 24)
    with engine(folders("llama"), SPARSE) as llm:
        assert answer(llm, prompts, new_tokens=24) == with_drafts


def test_preempted_requests_answer_as_if_they_had_not_been(folders):
    # 64 pages of 32 tokens for three requests that grow to 24 pages each.
    prompts = [prompt(10 * BLOCK, seed) for seed in range(3)]
    small = {"num_gpu_blocks_override": 64, "block_size": 32, "max_model_len": 1024, "max_num_seqs": 3}
    with engine(folders("llama"), SPARSE, **small, enable_prefix_caching=False) as llm:
        preempted = []
        scheduler = core(llm).scheduler
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda *a, **kw: (preempted.append(1), preempt(*a, **kw))[1]
        crowded = answer(llm, prompts, new_tokens=120)
        assert preempted
        alone = [tokens for ids in prompts for tokens in answer(llm, [ids], new_tokens=120)]
        assert crowded == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions(folders, dtype):
    with engine(folders("llama"), KEEP_ALL, dtype=dtype) as llm:
        kept = trace(llm, PROMPTS[0])
        reconfigure(llm, DENSE)
        dense = trace(llm, PROMPTS[0])
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x[0].double() for x in (kept.q, kept.k, kept.v)), is_causal=True, enable_gqa=True
        )
        ours, parents = (relative_error(x.out[0].double(), exact) for x in (kept, dense))
        assert ours < 2 * parents


@pytest.mark.skipif("avx512f" not in CPU_FLAGS, reason="vLLM has fp8 caches on CPUs with AVX-512 only")
def test_an_fp8_cache_on_a_cpu_is_the_parents_and_counted(folders):
    with engine(folders("llama"), SPARSE, kv_cache_dtype="fp8") as llm:
        ours = answer(llm, PROMPTS)
        assert stats(llm)["sparse_tokens"] == 0
        assert stats(llm)["dense_tokens"] == {"fp8 KV cache": (PROMPT_TOKENS + len(PROMPTS) * 7) * 2}
    with engine(folders("llama"), kv_cache_dtype="fp8") as llm:
        assert answer(llm, PROMPTS) == ours
