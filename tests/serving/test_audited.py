"""Audits in a real engine on the CPU: what they tell is true, and a target that is missed makes attention dense."""

import math

import pytest
import torch
import torch.nn.functional as F
from engines import (
    DENSE,
    KEEP_ALL,
    SPARSE,
    answer,
    config_of,
    engine,
    reconfigure,
    relative_error,
    set_chunk,
    stats,
    trace,
)
from tiny_families import prompt

from stem_attn import stem_attention

LENGTH, LAYERS = 1502, 2
IDS = prompt(LENGTH, 0)
AUDITED = {"audit_rows": 256}


@pytest.fixture(scope="module")
def llm(folders):
    with engine(folders("llama"), SPARSE, max_num_batched_tokens=2048, block_size=32) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _one_chunk(llm):
    set_chunk(llm, 2048)


def exact(q, k, v):
    """Attention probabilities and outputs in float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT / math.sqrt(q.shape[3])
    share = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -math.inf).softmax(-1)
    return share, share @ v


def truth(traced, layer):
    """A layer's recall and error, over all rows."""
    q, k, v, out = (getattr(traced, name)[layer] for name in ("q", "k", "v", "out"))
    _, selection = stem_attention(q, k, v, config=config_of(SPARSE), return_selection=True)
    share, dense = exact(q, k, v)
    size = selection.block_size
    kept = selection.to_mask().repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :LENGTH, :LENGTH]
    return float((share * kept).sum(-1).mean()), float((out - dense).norm() / dense.norm())


def test_intervals_hold_the_truth(llm):
    reconfigure(llm, {**SPARSE, **AUDITED})
    traced = trace(llm, IDS)
    found = stats(llm)["audit"]
    assert list(found) == list(range(LAYERS))
    for layer in range(LAYERS):
        recall, error = truth(traced, layer)
        value, low, high = found[layer]["recall"]
        assert low < recall < high
        assert low < value < high < low + 0.2
        value, low, high = found[layer]["error"]
        assert low < error < high
        assert low < value < high
    assert stats(llm)["redone"] == {}


def test_with_every_row_sampled_it_is_the_truth(llm, monkeypatch):
    monkeypatch.setattr("stem_attn.audit._QUERIES_A_CELL", 1)
    reconfigure(llm, {**SPARSE, "audit_rows": 2 * 4 * LENGTH})
    traced = trace(llm, IDS)
    found = stats(llm)["audit"]
    for layer in range(LAYERS):
        recall, error = truth(traced, layer)
        assert recall < 0.9
        assert found[layer]["recall"][0] == pytest.approx(recall, abs=1e-5)
        assert found[layer]["error"][0] == pytest.approx(error, rel=1e-3)


def test_with_everything_kept_nothing_is_lost(llm):
    reconfigure(llm, {**KEEP_ALL, **AUDITED, "min_recall": 0.94, "max_error": 0.25})
    answer(llm, [IDS], new_tokens=1)
    counts = stats(llm)
    for found in counts["audit"].values():
        assert found["recall"][0] == pytest.approx(1.0, abs=1e-6)
        assert found["error"][0] < 1e-5
    assert counts["redone"] == counts["redone_tokens"] == {}


def test_an_audit_changes_no_answer_and_no_global_random_state(llm):
    reconfigure(llm, SPARSE)
    plain = trace(llm, IDS)
    assert stats(llm)["audit"] == {}
    reconfigure(llm, {**SPARSE, **AUDITED})
    state = torch.get_rng_state()
    audited = trace(llm, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    for layer in range(LAYERS):
        assert torch.equal(audited.out[layer], plain.out[layer])


@pytest.mark.parametrize("target", [{"min_recall": 0.98}, {"max_error": 0.13}])
def test_a_target_out_of_reach_makes_every_sparse_call_dense(llm, target):
    set_chunk(llm, 512)
    reconfigure(llm, {**SPARSE, **AUDITED, **target})
    redone = trace(llm, IDS)
    counts = stats(llm)
    assert redone.chunks == [512, 512, 478]
    assert counts["redone"] == {0: 3, 1: 3}
    assert counts["redone_tokens"] == {0: LENGTH, 1: LENGTH}
    assert counts["sparse_tokens"] == LENGTH * LAYERS
    assert all(found["recall"][0] < 0.9 for found in counts["audit"].values())  # of the sparse attempts
    reconfigure(llm, DENSE)
    dense = trace(llm, IDS)
    assert stats(llm)["audit"] == {}
    for layer in range(LAYERS):
        assert relative_error(redone.out[layer], dense.out[layer]) < 1e-5


def test_each_prompt_of_a_batch_is_decided_alone(llm, monkeypatch):
    """A short one keeps all its blocks, a long one does not."""
    monkeypatch.setattr("stem_attn.audit._QUERIES_A_CELL", 1)  # of few queries many rows, so that they can show it
    reconfigure(llm, {**SPARSE, **AUDITED, "min_recall": 0.9})
    answer(llm, [IDS, prompt(60, 1)], new_tokens=1)
    counts = stats(llm)
    assert counts["sparse_tokens"] == (LENGTH + 60) * LAYERS
    assert counts["redone"] == {0: 1, 1: 1}
    assert counts["redone_tokens"] == {0: LENGTH, 1: LENGTH}


def test_a_reset_forgets_what_was_found(llm):
    reconfigure(llm, {**SPARSE, **AUDITED, "min_recall": 0.98})
    rows = []
    for _ in range(2):
        answer(llm, [IDS], new_tokens=1)
        rows.append(stats(llm)["audit"][0]["rows"])
        llm.reset_prefix_cache()
        if len(rows) == 1:
            llm.collective_rpc("stem_reset_stats")
            assert stats(llm)["audit"] == stats(llm)["redone"] == stats(llm)["redone_tokens"] == {}
    assert rows[0] == rows[1] > 0


def test_dense_attention_here_is_that_of_sdpa(llm):
    """What the truth above is made of."""
    reconfigure(llm, DENSE)
    traced = trace(llm, IDS)
    q, k, v = traced.q[0], traced.k[0], traced.v[0]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_error(exact(q, k, v)[1].float(), expected) < 1e-5
