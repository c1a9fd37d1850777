"""Verified prefill: what the audit of a model's layers finds, and what misses a target is dense."""

import copy
import dataclasses
import pickle

import pytest
import torch

from hf_models import KEEP_ALL, SPARSE, relative_error, skip_where_models_cannot_be_traced, tiny_model, tokens
from stem_attn import PrefillPolicy, select_blocks
from stem_attn.audit import AuditSums
from stem_attn.integrations import hf
from stem_attn.lab.equal_density import Choice
from stem_attn.lab.intercept import intercept
from stem_attn.lab.layer_numbers import DenseLayer
from stem_attn.methods import Stem

LENGTH = 1024
ROWS = 64
SHORT = 96  # for Triton's interpreter


def policy(**fields):
    return PrefillPolicy(**{"min_seq_len": 0, "crossover": False, "depth_decay": 1.0, **fields})


def logits_of(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def layers_of(model, ids):
    """The q, k, v of every layer of a dense forward."""
    found = {}

    def keep(layer, q, k, v, scale):
        found[layer] = DenseLayer(q, k, v, scale)
        return found[layer].out

    with intercept(model, keep):
        logits_of(model, ids)
    return found


def true_recall(layer, config):
    selection = select_blocks(layer.q, layer.k, layer.v, config=config, scale=layer.scale)
    return layer.measure(Choice(Stem(config), selection))


def test_without_rows_nothing_is_audited():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, SPARSE, policy=policy())
    logits_of(model, ids)
    assert hf.stats(model).audit == {}


def test_the_audit_changes_no_output_and_tells_of_every_layer():
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    hf.enable(model, SPARSE, policy=policy())
    plain = logits_of(model, ids)
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS))
    before = torch.get_rng_state()
    assert torch.equal(logits_of(model, ids), plain)
    assert torch.equal(torch.get_rng_state(), before)
    stats = hf.stats(model)
    assert list(stats.audit) == [0, 1]
    assert stats.redone == {}
    assert stats.sparse == 2
    for found in stats.audit.values():
        assert found.rows == 2 * 4 * 2 * (LENGTH // 128)
        assert 0 < found.recall.low < found.recall.value < found.recall.high < 1
        assert 0 < found.error.value < found.error.high
    hf.reset_stats(model)
    assert hf.stats(model).audit == {}
    logits_of(model, ids)
    assert hf.stats(model).audit == stats.audit  # the same rows again
    logits_of(model, ids)
    more = hf.stats(model).audit[0]
    assert more.rows == 2 * stats.audit[0].rows
    assert more.recall.high - more.recall.low < stats.audit[0].recall.high - stats.audit[0].recall.low


def test_it_holds_the_true_recall_and_error_of_the_first_layer():
    model, ids = tiny_model("qwen3"), tokens(1, LENGTH)
    truth = true_recall(layers_of(model, ids)[0], SPARSE)
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS))
    logits_of(model, ids)
    found = hf.stats(model).audit[0]
    assert found.recall.low <= truth.recall <= found.recall.high
    assert found.error.low <= truth.error <= found.error.high


def test_padded_rows_and_chunks_are_audited_by_their_own_tokens():
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :384] = 0
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS))
    logits_of(model, ids, mask)
    found = hf.stats(model).audit[0]
    assert found.rows == 4 * 2 * (LENGTH // 128) + 4 * 2 * ((LENGTH - 384) // 128)
    hf.reset_stats(model)
    with torch.no_grad(), hf.prompt_length(model, LENGTH):
        seen = model(ids[:1, :512])
        model(ids[:1, 512:], past_key_values=seen.past_key_values)
    chunked = hf.stats(model).audit[0]
    assert chunked.rows == 4 * 2 * (LENGTH // 128)
    hf.disable(model)
    truth = true_recall(layers_of(model, ids[:1])[0], SPARSE)
    assert chunked.recall.low <= truth.recall <= chunked.recall.high


@pytest.mark.parametrize("target", [{"min_recall": 0.85}, {"max_error": 0.35}])
def test_a_layer_that_misses_its_target_is_dense(target):
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    dense = logits_of(model, ids)
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS, **target))
    assert torch.equal(logits_of(model, ids), dense)
    stats = hf.stats(model)
    assert stats.redone == {0: 1, 1: 1}
    assert stats.dense == {"audit missed the target": 2}
    assert (stats.sparse, stats.density, stats.calls) == (0, None, 2)
    assert stats.audit[0].recall.value < 0.85


@pytest.mark.parametrize("target", [{"min_recall": 0.85}, {"max_error": 0.35}, {"min_recall": 0.85, "max_error": 0.35}])
def test_a_layer_that_meets_its_target_stays_sparse(target):
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, KEEP_ALL, policy=policy(audit_rows=ROWS, **target))
    logits_of(model, ids)
    stats = hf.stats(model)
    assert (stats.sparse, stats.redone, stats.density) == (2, {}, 1.0)


def on_kernels(model, backend="triton", **target):
    """Enable on the backend that decides without waiting: on a GPU, or in Triton's interpreter."""
    pytest.importorskip("triton")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    hf.enable(model, SPARSE, backend=backend, policy=policy(audit_rows=2 * ROWS, **target))


@pytest.fixture
def nobody_waits(monkeypatch):
    """During a forward no host may ask what an audit found. Short prompts have as many rows as long ones."""
    monkeypatch.setattr("stem_attn.audit._QUERIES_A_CELL", 3)
    forward = torch.nn.Module.__call__

    def guarded(module, *args, **kwargs):
        with monkeypatch.context() as inside:
            inside.setattr(AuditSums, "read", lambda _: pytest.fail("somebody waits for the device"))
            return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", guarded)


@pytest.mark.parametrize(
    "target", [{"min_recall": 0.95}, pytest.param({"min_recall": 0.01, "max_error": 0.2}, marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("nobody_waits")
def test_the_device_decides_alone(target, caplog):
    model, ids = tiny_model("llama"), tokens(2, SHORT)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    on_kernels(model, **target)
    ids, mask = ids.to(model.device), mask.to(model.device)
    with caplog.at_level("INFO", "stem_attn.hf"):
        out = logits_of(model, ids, mask)
        assert "audit missed" not in caplog.text  # nobody knows yet
        stats = hf.stats(model)
        assert caplog.text.count("dense attention: audit missed the target") == 1
    hf.disable(model)
    real = mask.bool()
    assert relative_error(out[real], logits_of(model, ids, mask)[real]) < 1e-4
    assert stats.redone == {0: 1, 1: 1}
    assert stats.dense == {"audit missed the target": 2}
    assert (stats.sparse, stats.density, stats.calls) == (0, None, 2)
    assert stats.tokens == {"sparse": 0, "banded": 0, "dense": 4 * SHORT}


@pytest.mark.slow
@pytest.mark.usefixtures("nobody_waits")
def test_the_device_leaves_alone_what_meets_its_target():
    model, ids = tiny_model("llama"), tokens(1, SHORT)
    on_kernels(model)
    ids = ids.to(model.device)
    plain, density = logits_of(model, ids), hf.stats(model).density
    on_kernels(model, min_recall=0.01, max_error=2.0)
    assert torch.equal(logits_of(model, ids), plain)
    stats = hf.stats(model)
    assert (stats.sparse, stats.redone, stats.dense, stats.density) == (2, {}, {}, density)


def test_what_the_device_decides_is_counted_as_what_the_host_does(monkeypatch):
    """Over two chunks, of which the layers miss the target or do not."""
    monkeypatch.setattr("stem_attn.audit._QUERIES_A_CELL", 3)
    model, ids = tiny_model("llama"), tokens(1, SHORT)
    counted = []
    for backend in ("cpu", "triton"):
        on_kernels(model, backend, min_recall=0.9, layer_budgets=(1.0, 40.0))
        with torch.no_grad():
            seen = model(ids[:, :48].to(model.device))
            model(ids[:, 48:].to(model.device), past_key_values=seen.past_key_values)
        copied = copy.deepcopy(model)
        stats = hf.stats(model)
        assert hf.stats(copied) == stats == hf.stats(model)  # the misses are counted once
        counted.append(dataclasses.replace(stats, audit={}))
    assert counted[0] == counted[1]
    assert set(stats.redone) == {0}
    assert stats.sparse == 4 - stats.redone[0] > 0


def test_one_missed_layer_leaves_the_others_sparse():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS, min_recall=0.85, layer_budgets=(1.0, 40.0)))
    logits_of(model, ids)
    stats = hf.stats(model)
    assert stats.redone == {0: 1}
    assert stats.sparse == 1


def test_a_compiled_model_is_audited_too():
    skip_where_models_cannot_be_traced()
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    dense = logits_of(model, ids)
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS, min_recall=0.85))
    out = logits_of(torch.compile(model, backend="eager"), ids)
    assert relative_error(out, dense) < 1e-5
    assert hf.stats(model).redone == {0: 1, 1: 1}


def test_other_methods_are_audited():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, method="a_shape", policy=policy(audit_rows=ROWS))
    logits_of(model, ids)
    assert hf.stats(model).audit[1].recall.value > 0


def test_counts_survive_copies():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, SPARSE, policy=policy(audit_rows=ROWS))
    logits_of(model, ids)
    found = hf.stats(model).audit
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hf.stats(copied).audit == found
        logits_of(copied, ids)
        assert hf.stats(copied).audit[0].rows == 2 * found[0].rows
    assert hf.stats(model).audit == found
