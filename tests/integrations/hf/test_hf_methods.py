"""The Hugging Face adapter with methods other than Stem."""

import copy
import dataclasses
import pickle

import pytest
import torch

from hf_models import BLOCK, KEEP_ALL, SPARSE, relative_error, skip_where_models_cannot_be_traced, tiny_model, tokens
from stem_attn import PrefillPolicy, StemConfig, methods
from stem_attn.integrations import hf
from stem_attn.methods import Stem

LENGTH = 600
ANY_LENGTH = PrefillPolicy(min_seq_len=0, crossover=False)

# Fields that keep everything at this length, and fields that do not. One row a method.
FIELDS = {
    "stem": ({"dense_below": 5000}, {"budget_ratio": 0.1, "budget_bias": 1, "tail_blocks": 0}),
    "dense": ({}, None),
    "oracle": ({"density": 1.0}, {"density": 0.2}),
    "uniform": ({"config": KEEP_ALL}, {"config": SPARSE, "k": 4}),
    "a_shape": ({"local_tokens": LENGTH}, {"local_tokens": 50}),
    "minference": ({}, {"vertical_tokens": 30, "slash_tokens": 50}),
    "flexprefill": ({"min_budget": LENGTH}, {"gamma": 0.2, "min_budget": 16}),
    "xattention": ({"threshold": 1.0}, {"threshold": 0.3}),
    "flashprefill": ({"alpha": 0.0}, {"alpha": 1.0}),
}


def method(name, fields):
    return methods.make(name, **(fields if "config" in fields else {"block_size": BLOCK, **fields}))


def logits_of(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def test_every_method_is_here():
    assert set(FIELDS) == set(methods.METHODS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_method_equals_dense_where_it_keeps_everything_and_not_elsewhere(name):
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    dense = logits_of(model, ids)
    everything, sparse = FIELDS[name]
    hf.enable(model, method=method(name, everything), policy=ANY_LENGTH)
    assert relative_error(logits_of(model, ids), dense) < 1e-5
    stats = hf.stats(model)
    assert (stats.method, stats.sparse, stats.calls, stats.density) == (name, 2, 2, 1.0)
    if sparse is not None:
        hf.enable(model, method=method(name, sparse), policy=ANY_LENGTH)
        assert relative_error(logits_of(model, ids), dense) > 1e-3
        stats = hf.stats(model)
        assert stats.method == name
        assert stats.sparse == 2
        assert stats.density < 0.7
    hf.disable(model)
    assert torch.equal(logits_of(model, ids), dense)


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"stem"}))
def test_by_name_it_has_its_published_defaults(name):
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, method=name, policy=ANY_LENGTH)
    by_name = logits_of(model, ids)
    assert hf.stats(model).method == name
    built = methods.make(name)
    hf.enable(model, method=built, policy=ANY_LENGTH)
    assert torch.equal(logits_of(model, ids), by_name)
    assert hf.stats(model).sparse == 2


def test_stem_by_name_or_instance_is_stem_with_its_config():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, SPARSE, policy=ANY_LENGTH)
    expected = logits_of(model, ids)
    for arguments in ({"config": SPARSE, "method": "stem"}, {"method": Stem(SPARSE)}):
        hf.enable(model, policy=ANY_LENGTH, **arguments)
        assert torch.equal(logits_of(model, ids), expected)
        assert hf.stats(model).method == "stem"
    hf.enable(model, method=Stem(KEEP_ALL), policy=PrefillPolicy(min_seq_len=0))  # Stem's crossover
    logits_of(model, ids)
    assert hf.stats(model).dense == {"no gain from sparsity": 2}


def test_uniform_by_name_takes_the_whole_config():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, SPARSE, method="uniform", policy=ANY_LENGTH)
    by_name = logits_of(model, ids)
    assert hf.stats(model).density < 0.7
    hf.enable(model, method=methods.make("uniform", config=SPARSE), policy=ANY_LENGTH)
    assert torch.equal(logits_of(model, ids), by_name)


def test_the_policy_gives_dense_layers_and_the_shortest_sparse_prompt():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    dense_blocks = method("dense", {})  # keeps everything, and yet runs sparse: there is no crossover
    hf.enable(model, policy=PrefillPolicy(min_seq_len=LENGTH, dense_layers=(0,)), method=dense_blocks)
    logits_of(model, ids)
    logits_of(model, ids[:, 1:])
    stats = hf.stats(model)
    assert stats.sparse == 1
    assert stats.dense == {"dense layer": 1, "short prompt": 2}


@pytest.mark.parametrize("name", ["stem", "uniform", "xattention"])
def test_the_config_gives_what_stands_for_pruned_blocks(name):
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    dense = logits_of(model, ids)
    base = StemConfig() if name == "xattention" else SPARSE
    chosen = method(name, {"threshold": 0.3}) if name == "xattention" else name
    hf.enable(model, base, method=chosen, policy=ANY_LENGTH)
    pruned = logits_of(model, ids)
    hf.enable(model, dataclasses.replace(base, residual="mean"), method=chosen, policy=ANY_LENGTH)
    returned = logits_of(model, ids)
    assert hf.stats(model).sparse == 2
    # A random model attends almost evenly, so that the means come near to dense attention.
    assert relative_error(returned, dense) < relative_error(pruned, dense) / 2


def test_padded_rows_choose_what_they_choose_alone():
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :77] = 0
    hf.enable(model, method=method("xattention", {"threshold": 0.5}), policy=ANY_LENGTH)
    together = logits_of(model, ids, mask)
    torch.testing.assert_close(together[0], logits_of(model, ids[:1])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1, 77:], logits_of(model, ids[1:, 77:])[0], atol=1e-5, rtol=1e-4)


def test_chunks_equal_one_pass_with_a_method_that_looks_back():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, method=method("flashprefill", {"alpha": 1.0}), policy=ANY_LENGTH)
    whole = logits_of(model, ids)
    cut = 20 * BLOCK
    with torch.no_grad(), hf.prompt_length(model, LENGTH):
        first = model(ids[:, :cut], use_cache=True)
        rest = model(ids[:, cut:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["xattention", "uniform"])
def test_copies_keep_the_method(name, duplicate):
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, method=method(name, FIELDS[name][1]), policy=ANY_LENGTH)
    twin = duplicate(model)
    assert torch.equal(logits_of(twin, ids), logits_of(model, ids))
    assert hf.stats(twin) == hf.stats(model)


def test_a_method_runs_within_a_compiled_graph():
    skip_where_models_cannot_be_traced()
    torch._dynamo.reset()
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    hf.enable(model, method=method("xattention", {"threshold": 0.5}), policy=ANY_LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :300], use_cache=True).past_key_values
        expected = model(ids[:, 300:], past_key_values=cache).logits
        cache.crop(-300)
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        actual = run(ids[:, 300:], past_key_values=cache).logits
    assert relative_error(actual, expected) < 1e-5
    assert hf.stats(model).sparse == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fast"}, "unknown method 'fast'; known: stem, dense"),
        ({"method": 3}, r"must be a name or have block_size and select\(q, k, v\), got int"),
        ({"method": StemConfig()}, "got StemConfig"),
        (
            {"config": SPARSE, "method": "xattention"},
            r"config.block_size has no effect on method 'xattention'.*make\(",
        ),
        ({"config": "official", "method": "dense"}, "config.score has no effect on method 'dense'"),
        ({"config": SPARSE, "method": Stem(KEEP_ALL)}, "brings its own config"),
        (
            {"method": methods.make("uniform", config=StemConfig(precision="fp8"))},
            "the method's config asks for precision='fp8'.*config says 'auto'",
        ),
        (
            {"method": Stem(SPARSE, backend="triton"), "backend": "cpu"},
            "names the backend 'triton', but backend is 'cpu'",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        hf.enable(model, **arguments)
    assert model.config._attn_implementation == "sdpa"
