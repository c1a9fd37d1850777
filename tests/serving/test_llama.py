"""The CPU backend in a real engine: a tiny Llama, chunked prefill, prefixes, mixed batches, many prompts."""

import pytest
import torch
from engines import (
    BLOCK,
    DENSE,
    KEEP_ALL,
    SPARSE,
    answer,
    attention_layers,
    builders,
    config_of,
    engine,
    reconfigure,
    relative_error,
    runner,
    set_chunk,
    stats,
    trace,
)
from tiny_families import greedy, prompt

from stem_attn import stem_attention

LENGTH = 1502
PROMPTS = [prompt(n, seed) for seed, n in enumerate((LENGTH, 33, 700, 64, 1025, 1, 512))]
LAYERS = 2


@pytest.fixture(scope="module")
def llm(folders):
    with engine(folders("llama"), SPARSE, max_num_batched_tokens=2048, block_size=32) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _fresh(llm):
    reconfigure(llm, SPARSE)
    set_chunk(llm, 512)


def test_prefill_is_sparse_and_is_what_stem_attention_gives(llm):
    traced = trace(llm, PROMPTS[0])
    counts = stats(llm)
    assert traced.chunks == [512, 512, 478]
    assert counts["sparse_tokens"] == LENGTH * LAYERS
    assert counts["dense_tokens"] == {}
    assert counts["unknown_prompt_len_tokens"] == 0
    assert counts["selections"] == 3 * LAYERS
    assert counts["selection_seconds"] > 0
    for q, k, v, out in zip(traced.q, traced.k, traced.v, traced.out, strict=True):
        expected, selection = stem_attention(q, k, v, config=config_of(SPARSE), return_selection=True)
        assert relative_error(out, expected) < 1e-5
        assert counts["density"] == pytest.approx(selection.density())  # the same in every layer: the budget's
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert relative_error(out, dense) > 0.05


def test_with_everything_kept_attention_equals_the_dense_parent(llm):
    reconfigure(llm, KEEP_ALL)
    kept = trace(llm, PROMPTS[0])
    counts = stats(llm)
    assert counts["density"] == 1
    assert counts["sparse_tokens"] == LENGTH * LAYERS
    reconfigure(llm, DENSE)
    dense = trace(llm, PROMPTS[0])
    counts = stats(llm)
    assert counts["sparse_tokens"] == 0
    assert counts["dense_tokens"] == {"short prompt": LENGTH * LAYERS}
    for ours, parents in zip(kept.out, dense.out, strict=True):
        assert relative_error(ours, parents) < 1e-5


@pytest.mark.parametrize("stem", [KEEP_ALL, DENSE], ids=["everything kept", "dense"])
def test_tokens_equal_those_of_transformers(llm, folders, stem):
    reconfigure(llm, stem)
    set_chunk(llm, 300)  # steps mix prefills, decodes and odd chunk boundaries
    assert answer(llm, PROMPTS) == greedy(folders("llama"), PROMPTS, 8)
    counts = stats(llm)
    sparse = sum(map(len, PROMPTS)) - 1 if stem is KEEP_ALL else 0  # a prompt of one token is a decode
    assert counts["dense_tokens"]["decode"] == (len(PROMPTS) * 7 + (sparse > 0)) * LAYERS
    assert counts["sparse_tokens"] == sparse * LAYERS


@pytest.mark.parametrize("chunk", [128, 512, 2048])
def test_chunks_that_end_at_blocks_give_what_one_prefill_gives(llm, chunk):
    set_chunk(llm, chunk)
    chunked = trace(llm, PROMPTS[0])
    assert max(chunked.chunks) == min(chunk, LENGTH)
    set_chunk(llm, 1536)
    reconfigure(llm, SPARSE)
    whole = trace(llm, PROMPTS[0])
    assert whole.chunks == [LENGTH]
    assert relative_error(chunked.out[-1], whole.out[-1]) < 1e-5
    q, k, v = whole.q[-1], whole.k[-1], whole.v[-1]
    assert relative_error(whole.out[-1], stem_attention(q, k, v, config=config_of(SPARSE))) < 1e-5


def test_a_chunk_that_cuts_blocks_is_exact_with_everything_kept(llm):
    set_chunk(llm, 476)
    assert 476 % BLOCK
    reconfigure(llm, KEEP_ALL)
    kept = trace(llm, PROMPTS[0])
    assert kept.chunks == [476, 476, 476, 74]
    reconfigure(llm, DENSE)
    assert relative_error(kept.out[-1], trace(llm, PROMPTS[0]).out[-1]) < 1e-5


def test_a_chunk_that_cuts_blocks_keeps_the_budget_of_the_whole_prompt(llm):
    set_chunk(llm, 476)
    cut = trace(llm, PROMPTS[0])
    # Every chunk alone, as the core does it: the rows keep their absolute places, the budget is the prompt's.
    start = 0
    q, k, v = cut.q[0], cut.k[0], cut.v[0]
    for tokens in cut.chunks:
        stop = start + tokens
        expected = stem_attention(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], config=config_of(SPARSE), prompt_len=LENGTH
        )
        assert relative_error(cut.out[0][:, :, start:stop], expected) < 1e-5
        start = stop


@pytest.mark.parametrize("shared", [32, 96, 1024, 1472], ids=lambda n: f"{n} shared")
def test_prefix_hits_at_any_page(llm, shared):
    # Pages of 32 tokens, blocks of 64: a hit of an odd number of pages ends inside a block.
    reconfigure(llm, KEEP_ALL)
    first, second = PROMPTS[0], PROMPTS[0][:shared] + prompt(LENGTH - shared, seed=99)
    (alone,) = answer(llm, [second])
    llm.reset_prefix_cache()
    answer(llm, [first], new_tokens=1)
    llm.collective_rpc("stem_reset_stats")
    assert answer(llm, [second]) == [alone]
    assert stats(llm)["sparse_tokens"] == (LENGTH - shared) * LAYERS


def test_a_sparse_prefix_hit_at_a_block_gives_what_the_whole_prompt_gives(llm):
    shared = 16 * BLOCK
    second = PROMPTS[0][:shared] + prompt(LENGTH - shared, seed=99)
    whole = trace(llm, second)
    llm.reset_prefix_cache()
    answer(llm, [PROMPTS[0]], new_tokens=1)  # as long as the other, so its rows had the same budget
    hit = trace(llm, second)
    assert sum(hit.chunks) == LENGTH - shared
    assert relative_error(hit.out[-1], whole.out[-1][:, :, shared:]) < 1e-5


def test_a_repeated_prompt_computes_what_is_not_cached(llm):
    first = answer(llm, [PROMPTS[4]])
    llm.collective_rpc("stem_reset_stats")
    assert answer(llm, [PROMPTS[4]]) == first
    counts = stats(llm)  # 1025 tokens: 32 whole pages and one token, which is a decode to vLLM
    assert counts["sparse_tokens"] == 0
    assert counts["dense_tokens"] == {"decode": (1 + 7) * LAYERS}


def test_each_prompt_of_a_batch_is_sparse_by_its_own_length(llm):
    set_chunk(llm, 4 * 2048)
    together = answer(llm, PROMPTS)
    alone = []
    for ids in PROMPTS:
        llm.reset_prefix_cache()
        alone += answer(llm, [ids])
    assert together == alone


def test_dense_layers_and_short_prompts_go_to_the_parent(llm):
    reconfigure(llm, {**SPARSE, "min_seq_len": 701})
    answer(llm, PROMPTS)
    counts = stats(llm)
    assert counts["sparse_tokens"] == (LENGTH + 1025) * LAYERS
    assert counts["dense_tokens"]["short prompt"] == (33 + 700 + 64 + 1 + 512) * LAYERS


def test_the_crossover_sends_what_would_not_be_faster_to_the_parent(llm):
    reconfigure(llm, {**SPARSE, "budget_ratio": 0.9, "crossover": True})
    answer(llm, PROMPTS[:1], new_tokens=1)
    assert stats(llm)["dense_tokens"] == {"no gain from sparsity": LENGTH * LAYERS}


def test_an_unknown_prompt_length_is_counted_and_budgeted_by_what_is_seen(llm, monkeypatch):
    from stem_attn.integrations.vllm import compat

    monkeypatch.setattr(compat, "lacks", lambda part: ("a.b is gone",) if part == "V1 runner" else ())
    for builder in builders(llm):
        monkeypatch.setattr(builder, "_requests", compat.Requests("stem"))
    seen = trace(llm, PROMPTS[0])
    assert stats(llm)["unknown_prompt_len_tokens"] == LENGTH * LAYERS
    q, k, v = (x[0][:, :, :1024] for x in (seen.q, seen.k, seen.v))
    expected = stem_attention(q[:, :, 512:], k, v, config=config_of(SPARSE), prompt_len=1024)
    assert relative_error(seen.out[0][:, :, 512:1024], expected) < 1e-5


def test_the_classes_are_the_parents_with_stem_in_front(llm):
    from stem_attn.integrations.vllm.cpu import StemCpuBuilder, StemCpuImpl

    assert {type(layer.impl) for layer in attention_layers(llm).values()} == {StemCpuImpl}
    assert {type(builder) for builder in builders(llm)} == {StemCpuBuilder}
    assert runner(llm).vllm_config.attention_config.backend.name == "STEM"
