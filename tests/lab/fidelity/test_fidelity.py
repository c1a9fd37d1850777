import pytest
import torch

import tiny_model
from stem_attn import PrefillPolicy, StemConfig
from stem_attn.integrations import hf
from stem_attn.lab.equal_density import select_at_density
from stem_attn.lab.fidelity.paper_tests import PAPER_TESTS
from stem_attn.lab.fidelity.run import Candidate, Found, measure_prompt
from stem_attn.lab.layer_numbers import DenseLayer, LayerNumbers, at_density
from stem_attn.lab.logits import compare_positions, keep_hidden
from stem_attn.lab.named_methods import NamedMethod

BLOCK = 16
OFFICIAL, DENSE, ORACLE = (NamedMethod(name, name) for name in ("stem-official", "dense", "oracle"))
UNIFORM, XATTENTION = NamedMethod("uniform", "uniform"), NamedMethod("xattention", "xattention")


def qkv(tokens=1024, seed=0):
    """Heads that attend to some keys far more than to others."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, 32, generator=generator) for heads in (4, 2, 2))
    return 3 * q, k, v


def prompt(tokens=512):
    return torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))


def measure(candidates, model=None, ids=None, logit_stride=1):
    found = Found()
    measure_prompt(
        model or tiny_model.model(), prompt() if ids is None else ids, candidates, prompt=0, block_size=BLOCK,
        logit_stride=logit_stride, on_step=lambda step: None, found=found,
    )  # fmt: skip
    return found


def test_layer_numbers_are_those_of_plain_attention():
    q, k, v = qkv(256)
    layer = DenseLayer(q, k, v, None)
    (choice,) = select_at_density(NamedMethod("x", "xattention", {"threshold": 0.8}), BLOCK, None, q, k, v, None)
    numbers = layer.measure(choice)

    logits = q @ k.repeat_interleave(2, 1).mT * 32**-0.5
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    kept = choice.selection.to_mask().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3) & causal
    values = v.repeat_interleave(2, 1)
    exact = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    dense, sparse = exact @ values, logits.masked_fill(~kept, -torch.inf).softmax(-1) @ values
    assert numbers.error == pytest.approx(((sparse - dense).norm() / dense.norm()).item(), rel=1e-4)
    last = slice(224, None)
    assert numbers.error_by_position[-1] == pytest.approx(
        ((sparse - dense)[:, :, last].norm() / dense[:, :, last].norm()).item(), rel=1e-4
    )
    by_query = (exact * kept).sum(-1).mean((0, 1))
    assert numbers.recall == pytest.approx(by_query.mean().item(), rel=1e-5)
    assert numbers.recall_by_position[-1] == pytest.approx(by_query[last].mean().item(), rel=1e-5)
    assert numbers.density == choice.selection.density()


def test_keeping_everything_loses_nothing():
    found = measure([Candidate(DENSE, None), Candidate(OFFICIAL, 1.0)])
    assert len(found.layers) == 4
    for row in found.layers:
        assert row["error"] < 1e-6
        assert row["recall"] == pytest.approx(1, abs=1e-6)
    for row in found.propagated:
        assert row["density"] == 1
        assert abs(row["kl_nats"]) < 1e-6
        assert row["top1_agreement"] == 1
        assert row["sparse_nll"] == pytest.approx(row["dense_nll"], rel=1e-6)


def test_error_falls_with_density_and_the_oracle_recalls_most():
    q, k, v = qkv()
    layer = DenseLayer(q, k, v, None)

    def numbers(named, density):
        return at_density([layer.measure(c) for c in select_at_density(named, BLOCK, density, q, k, v, None)], density)

    official = [numbers(OFFICIAL, density) for density in (0.3, 0.4, 0.6, 0.8)]
    errors = [one.error for one in official]
    assert errors == sorted(errors, reverse=True)
    assert [one.density for one in official] == pytest.approx([0.3, 0.4, 0.6, 0.8])
    best = numbers(ORACLE, 0.4).recall
    for named in (OFFICIAL, UNIFORM, XATTENTION):
        assert numbers(named, 0.4).recall < best


def test_interpolation_is_linear_in_density():
    below = LayerNumbers(0.2, 0.4, 0.5, [0.4, 0.2], [0.5, 0.5])
    above = LayerNumbers(0.3, 0.2, 0.9, [0.2, 0.2], [0.7, 0.9])
    mixed = at_density([below, above], 0.25)
    assert mixed.density == pytest.approx(0.25)
    assert mixed.error == pytest.approx(0.3)
    assert mixed.recall_by_position == pytest.approx([0.6, 0.7])
    assert at_density([below, above], 0.2) == below
    assert at_density([above], 0.9) == above


def test_propagated_numbers_are_those_of_the_adapter():
    model, ids = tiny_model.model(), prompt()
    config = StemConfig(block_size=BLOCK, budget_ratio=0.2, budget_bias=0)
    fields = {"budget_ratio": 0.2, "budget_bias": 0, "min_seq_len": 0}
    (row,) = measure([Candidate(NamedMethod("mine", "stem-default", fields), None)], model, ids).propagated
    with torch.inference_mode():
        with keep_hidden(model) as hidden:
            model(ids, use_cache=False)
            hf.enable(model, config, policy=PrefillPolicy(min_seq_len=0, crossover=False))
            model(ids, use_cache=False)
        density = hf.stats(model).density
        hf.disable(model)
        numbers = compare_positions(model, *hidden, ids)
    assert row["density"] == pytest.approx(density)
    assert row["kl_nats"] == pytest.approx(numbers.mean_kl_nats, rel=1e-4)
    assert row["kl_nats"] > 1e-3
    assert row["top1_agreement"] == numbers.top1_agreement
    assert row["sparse_nll"] == pytest.approx(float(numbers.sparse_nll.mean()), rel=1e-5)


def test_logit_stride_looks_at_every_nth_position():
    model, ids = tiny_model.model(), prompt()
    with torch.inference_mode():
        with keep_hidden(model) as hidden:
            model(ids)
            model(ids.roll(1))
        every, third = (compare_positions(model, *hidden, ids, stride=stride) for stride in (1, 3))
    assert third.positions.tolist() == list(range(0, 512, 3))
    torch.testing.assert_close(third.kl_nats, every.kl_nats[::3])
    torch.testing.assert_close(third.dense_nll, every.dense_nll[::3])
    assert len(every.dense_nll) == 511


def test_sliding_window_layers_stay_exact_and_are_counted():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 1
        + ["sliding_attention"], max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    found = measure([Candidate(OFFICIAL, 0.5), Candidate(DENSE, None)], model)
    assert {row["layer"] for row in found.layers} == {1}
    assert found.other_calls == {"sliding window or padding": 2}
    assert [row["kl_nats"] > 1e-4 for row in found.propagated] == [True, False]
    with torch.inference_mode(), keep_hidden(model) as hidden:
        model(prompt())
        plain = hidden[0].last_hidden_state
    assert model.config._attn_implementation == "sdpa"
    assert plain.isfinite().all()


def test_a_case_that_cannot_be_reached_is_left_out_and_named():
    found = measure([Candidate(OFFICIAL, 0.05), Candidate(OFFICIAL, 0.5)])
    assert list(found.unreachable) == [Candidate(OFFICIAL, 0.05)]
    assert {row["target"] for row in (*found.layers, *found.propagated)} == {0.5}


def test_paper_tests_change_what_they_say():
    uniform, decayed, stem = (named.build(BLOCK).config for _, named in PAPER_TESTS["table5"].methods)
    assert (uniform.decay, uniform.value_term) == (1.0, "none")
    assert (decayed.decay, decayed.value_term) == (0.7, "none")
    assert stem == StemConfig.preset("official", block_size=BLOCK)
    for test in PAPER_TESTS.values():
        names = [named.name for _, named in test.methods]
        builds = {named.name: (named.build(BLOCK), named.rows) for _, named in test.methods}
        assert len({repr(build) for build in builds.values()}) == len(set(names))


def test_a_residual_is_part_of_a_methods_output():
    model, ids = tiny_model.model(), prompt()
    fields = {"budget_ratio": 0.2, "budget_bias": 0, "min_seq_len": 0}
    plain, mean = (NamedMethod(kind, "stem-default", {**fields, "residual": kind}) for kind in ("none", "mean"))
    found = measure([Candidate(plain, None), Candidate(mean, None)], model, ids)
    assert found.layers[0]["error"] != found.layers[1]["error"]
    with torch.inference_mode():
        with keep_hidden(model) as hidden:
            model(ids, use_cache=False)
            hf.enable(model, mean.build(BLOCK).config, policy=PrefillPolicy(min_seq_len=0, crossover=False))
            model(ids, use_cache=False)
        hf.disable(model)
        numbers = compare_positions(model, *hidden, ids)
    assert found.propagated[1]["kl_nats"] == pytest.approx(numbers.mean_kl_nats, rel=1e-4)
