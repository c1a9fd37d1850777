"""Models with a softcap (Gemma 2) or sinks (gpt-oss): sparse and banded, and right where they stay dense."""

import sys

import pytest
import torch
from test_hf_families import KINDS, LEFT, LENGTH, RIGHT, run
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_models import (
    BLOCK,
    KEEP_ALL,
    SPARSE,
    enable,
    relative_error,
    skip_where_models_cannot_be_traced,
    tiny_model,
    tokens,
)
from stem_attn import StemConfig
from stem_attn.integrations import hf
from stem_attn.integrations.hf.properties import Properties, properties_of
from stem_attn.reference import reference_attention

HYBRID = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gemma2": {**HYBRID, "attn_logit_softcapping": 1.0},
    "gpt_oss": {**HYBRID, "num_local_experts": 4},
}


def tiny(family, **fields):
    model = tiny_model(family, "eager", **{**FAMILIES[family], **fields})
    for n, layer in enumerate(model.model.layers):
        if family == "gpt_oss":
            layer.self_attn.sinks.data = torch.linspace(-1, 4, 4) + n
        else:  # logits that reach the softcap
            layer.self_attn.q_proj.weight.data *= 20
            layer.self_attn.k_proj.weight.data *= 20
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def own_function(model):
    """The file of a model's attention, with its eager function."""
    return sys.modules[type(model.model.layers[0].self_attn).__module__]


def forbid_eager(model, monkeypatch):
    monkeypatch.setattr(own_function(model), "eager_attention_forward", lambda *_, **__: pytest.fail("it ran eagerly"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_everything_kept_equals_the_models_own_attention(family, kind, monkeypatch):
    model, ids = tiny(family), tokens(2, LENGTH)
    expected = run(model, ids, kind)
    enable(model, KEEP_ALL)
    forbid_eager(model, monkeypatch)
    assert relative_error(run(model, ids, kind), expected) < 1e-4
    stats = hf.stats(model)
    assert stats.sparse == stats.banded == stats.calls / 2 > 0


@torch.no_grad()
def test_the_property_shows(family):
    """Otherwise nothing here would be tested."""
    model, ids = tiny(family), tokens(1, LENGTH)
    expected = model(ids).logits
    for layer in model.model.layers:
        if family == "gemma2":
            layer.self_attn.attn_logit_softcapping = None
        else:
            layer.self_attn.sinks.data.fill_(-torch.inf)
    assert relative_error(model(ids).logits, expected) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_really_sparse_is_the_reference_over_the_same_blocks(family, kind, monkeypatch):
    model, ids = enable(tiny(family), SPARSE), tokens(2, LENGTH)
    calls, adapter = [], ALL_ATTENTION_FUNCTIONS["stem"]
    selections, of = [], hf.counters.Kept.of

    def spy(module, query, key, value, mask, **kwargs):
        out = adapter(module, query, key, value, mask, **kwargs)
        if module.sliding_window is None:
            calls.append((query, key, value, kwargs, out[0]))
        return out

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "stem", spy)
    monkeypatch.setattr(hf.counters.Kept, "of", lambda s: (selections.append(s.to_mask()), of(s))[1])
    run(model, ids, kind)
    stats = hf.stats(model)
    assert stats.sparse == len(calls) > 0
    assert stats.density < 0.75
    first = {"left": [0, LEFT]}.get(kind, [0, 0])
    end = {"right": [RIGHT, LENGTH]}.get(kind, [LENGTH, LENGTH])
    masks = iter(selections)
    for q, k, v, kwargs, out in calls:
        offset = k.shape[2] - q.shape[2]
        alike = first[0] == first[1] and end[0] == end[1]
        for rows in [slice(0, 2)] if alike else [slice(0, 1), slice(1, 2)]:
            keys = slice(first[rows.start], min(end[rows.start], k.shape[2]))
            queries = slice(max(keys.start - offset, 0), keys.stop - offset)
            part = (x[rows] for x in (q[:, :, queries], k[:, :, keys], v[:, :, keys]))
            how = {"scale": kwargs["scaling"], "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
            expected, _ = reference_attention(*part, next(masks), BLOCK, **how)
            assert relative_error(out[rows, queries], expected.transpose(1, 2)) < 1e-5


@torch.no_grad()
def test_generate_from_left_padding_and_in_chunks(family):
    model, ids = tiny(family), tokens(2, 10 * BLOCK)
    mask = torch.ones_like(ids)
    mask[1, :LEFT] = 0
    inputs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **inputs)
    enable(model, KEEP_ALL)
    assert torch.equal(model.generate(ids, **inputs), expected)
    stats = hf.stats(model)
    assert stats.sparse == stats.banded == 1
    assert stats.dense == {"decode": 10}
    assert torch.equal(model.generate(ids, **inputs, prefill_chunk_size=4 * BLOCK), expected)


@torch.no_grad()
def test_dense_layers_are_exact_without_the_eager_function(family, monkeypatch):
    """Their softcap and sinks need no memory quadratic in the prompt."""
    model, ids = tiny(family), tokens(2, LENGTH)
    expected = run(model, ids, "left")
    enable(model, SPARSE, dense_layers=(0, -1))
    forbid_eager(model, monkeypatch)
    assert relative_error(run(model, ids, "left"), expected) < 1e-4
    stats = hf.stats(model)
    assert stats.banded == 1  # a band is exact
    assert stats.dense == {"dense layer": 1}
    hf.disable(model)
    enable(model, KEEP_ALL, crossover=True)
    assert relative_error(run(model, ids, "left"), expected) < 1e-4
    assert hf.stats(model).dense == {"no gain from sparsity": 1}


@pytest.mark.parametrize("case", ["short prompt", "padding between tokens", "output_attentions", "4-D mask"])
@torch.no_grad()
def test_what_stays_dense_runs_the_models_own_function(family, case, monkeypatch):
    model, ids = tiny(family), tokens(2, LENGTH)
    mask, inputs = torch.ones(2, LENGTH, dtype=torch.long), {}
    if case == "padding between tokens":
        mask[0, 50:60] = 0
        inputs["attention_mask"] = mask
    elif case == "4-D mask":
        low = torch.finfo(torch.float32).min
        whole = torch.full((2, 1, LENGTH, LENGTH), low).triu(1)
        inputs["attention_mask"] = {
            "full_attention": whole,
            "sliding_attention": whole + torch.full_like(whole, low / 2).tril(-40),
        }
    elif case == "output_attentions":
        inputs["output_attentions"] = True
    real = mask.bool()
    expected = model(ids, **inputs).logits[real]
    enable(model, SPARSE, **({"min_seq_len": 4096} if case == "short prompt" else {}))
    calls, own = [], own_function(model).eager_attention_forward
    monkeypatch.setattr(
        own_function(model), "eager_attention_forward", lambda *a, **k: (calls.append(1), own(*a, **k))[1]
    )
    assert relative_error(model(ids, **inputs).logits[real], expected) < 1e-6
    stats = hf.stats(model)
    assert stats.dense == {case: 2}
    assert len(calls) == 2


def test_training_is_the_models_own(family):
    model, ids = tiny(family), tokens(1, LENGTH)
    weight = model.model.layers[1].self_attn.q_proj.weight
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), weight)[0]
    enable(model, SPARSE)
    actual = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), weight)[0]
    assert relative_error(actual, expected) < 1e-5


def test_a_sink_that_learns_alone_is_training():
    model, ids = tiny("gpt_oss"), tokens(1, LENGTH)
    model.requires_grad_(False)
    sinks = model.model.layers[1].self_attn.sinks.requires_grad_(True)
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), sinks)[0]
    enable(model, SPARSE)
    actual = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), sinks)[0]
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("reason", [None, "short prompt", "dense layer"])
@torch.no_grad()
def test_one_graph(family, reason):
    skip_where_models_cannot_be_traced()
    torch._dynamo.reset()
    fields = {"short prompt": {"min_seq_len": 4096}, "dense layer": {"dense_layers": (-1,)}}.get(reason, {})
    model, ids = enable(tiny(family), SPARSE, **fields), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :LEFT] = 0
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    eager = hf.stats(model)
    assert reason is None or reason in eager.dense
    hf.reset_stats(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-5
    assert hf.stats(model) == eager


@torch.no_grad()
def test_autocast_casts_as_ever(family):
    model, ids = enable(tiny(family), KEEP_ALL), tokens(1, LENGTH)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(ids, use_cache=False).logits.float(), expected) < 0.05
    assert hf.stats(model).sparse == hf.stats(model).banded == 2


def test_properties_of_other_forms_are_not_ours():
    query, sinks = torch.zeros(2, 4, 8, 16), torch.zeros(4)
    assert properties_of(query, {"softcap": None, "s_aux": None}) == (Properties(), None)
    assert properties_of(query, {"softcap": 5.0, "s_aux": sinks}) == (Properties(5.0, sinks), None)
    per_query = torch.zeros(2, 4, 8, 1)  # of Inkling 2
    assert properties_of(query, {"sinks": per_query}) == (Properties(), "attention sinks")
    assert properties_of(query, {"s_aux": per_query}) == (Properties(), "attention sinks")
    assert properties_of(query, {"softcap": torch.tensor(5.0)}) == (Properties(), "softcap")


@torch.no_grad()
def test_a_softcap_that_is_none_is_plain_attention():
    """Of a Gemma 2 without one, dense calls go to SDPA as other models' do."""
    model, ids = tiny("gemma2", attn_logit_softcapping=None), tokens(2, LENGTH)
    expected = run(model, ids, "left")
    enable(model, StemConfig(block_size=BLOCK), min_seq_len=4096)
    assert relative_error(run(model, ids, "left"), expected) < 1e-4
    assert hf.stats(model).dense == {"short prompt": 2}


@torch.no_grad()
def test_an_audit_knows_them_and_what_misses_its_target_is_dense(family, monkeypatch):
    model, ids = tiny(family), tokens(1, 1024)
    expected = model(ids).logits
    enable(model, KEEP_ALL, audit_rows=64, min_recall=0.9)
    forbid_eager(model, monkeypatch)
    model(ids)
    stats = hf.stats(model)
    assert stats.redone == {}
    assert stats.audit[1].recall.value == pytest.approx(1)
    assert stats.audit[1].error.value < 1e-4
    enable(model, SPARSE, audit_rows=64, min_recall=0.9)
    assert relative_error(model(ids).logits, expected) < 1e-4
    assert hf.stats(model).redone == {1: 1}
    assert hf.stats(model).dense == {"audit missed the target": 1}
