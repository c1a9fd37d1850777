"""SmolLM2 in an engine of this process: what chunk boundaries change in its predictions, and prefill times."""

import os
import time

import pytest
import torch
from engines import answer, engine, reconfigure, relative_error, runner, set_chunk, stats

pytestmark = pytest.mark.slow

SPARSE = {"block_size": 64, "budget_bias": 8, "min_seq_len": 1024, "crossover": False}
KEEP_ALL = {**SPARSE, "budget_ratio": 1.0, "decay": 1.0}
DENSE = {**SPARSE, "min_seq_len": 10**9}
LENGTH = 4000
FIRST = 1024  # predictions before this see hardly any sparsity


@pytest.fixture(scope="module")
def llm():
    with engine(os.environ["STEM_TEST_MODEL"], DENSE, max_num_batched_tokens=4096, max_model_len=4096) as llm:
        answer(llm, [[1] * 64])
        yield llm


@pytest.fixture(scope="module")
def ids():
    from transformers import AutoTokenizer

    from stem_attn.lab.prompts import public_text

    tokenizer = AutoTokenizer.from_pretrained(os.environ["STEM_TEST_MODEL"])
    return tokenizer(public_text()[0][:60_000]).input_ids[:LENGTH]


def prefill(llm, ids, stem, chunk):
    """Final hidden states [T, hidden] of a prompt, and the seconds its prefill took."""
    reconfigure(llm, stem)
    set_chunk(llm, chunk)
    parts = []
    norm = runner(llm).model.model.norm  # gives its output and the residual
    handle = norm.register_forward_hook(lambda module, args, out: parts.append(out[0].clone()))
    began = time.perf_counter()
    answer(llm, [ids], new_tokens=1)
    seconds = time.perf_counter() - began
    handle.remove()
    return torch.cat(parts)[: len(ids)], seconds


def divergence(llm, reference, other):
    """Mean KL divergence of the next-token predictions, in nats."""
    head = runner(llm).model.lm_head.weight
    total = 0.0
    for start in range(FIRST, LENGTH, 500):
        p, q = ((x[start : start + 500] @ head.T).log_softmax(-1) for x in (reference, other))
        total += float((p.exp() * (p - q)).sum())
    return total / (LENGTH - FIRST)


def test_chunks(llm, ids, record_property):
    dense, dense_seconds = prefill(llm, ids, DENSE, 2048)
    kept, _ = prefill(llm, ids, KEEP_ALL, 476)
    assert relative_error(kept, dense) < 1e-4
    whole, _ = prefill(llm, ids, SPARSE, 4096)
    density = stats(llm)["density"]
    chunked = {}
    for chunk in (128, 512, 2048):
        chunked[chunk], seconds = prefill(llm, ids, SPARSE, chunk)
        assert relative_error(chunked[chunk], whole) < 1e-4
        if chunk == 2048:
            sparse_seconds, selection_seconds = seconds, stats(llm)["selection_seconds"]
    cut, _ = prefill(llm, ids, SPARSE, 476)
    by_cut, by_sparsity = divergence(llm, whole, cut), divergence(llm, dense, whole)
    record_property(
        "SmolLM2",
        f"{LENGTH} tokens, float32, density {density:.3f}: KL of sparse chunks of 476 from one sparse prefill"
        f" {by_cut:.2e}, of one sparse prefill from dense {by_sparsity:.2e} nats; prefill in chunks of 2048: dense"
        f" {dense_seconds:.1f} s, sparse {sparse_seconds:.1f} s, of which selection {selection_seconds:.2f} s",
    )
    assert density < 0.6
    assert by_cut < by_sparsity
