import pytest
import torch
from torch.nn import functional as F
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_model
from stem_attn import PrefillPolicy, StemConfig
from stem_attn.integrations import hf
from stem_attn.lab.errors import InputError
from stem_attn.lab.prefill.run import compare

SPARSE = StemConfig(block_size=16, budget_ratio=0.2, budget_bias=0)
EVERYTHING = StemConfig(block_size=16, budget_ratio=1.0, decay=1.0)
POLICY = PrefillPolicy(min_seq_len=64, crossover=False)


def ids(tokens: int = 400) -> torch.Tensor:
    return torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))


def run(model, config, prompt=None, policy=POLICY, **kwargs):
    seen = []

    prompt = ids() if prompt is None else prompt
    kwargs = {"new_tokens": 8, "rounds": 1, **kwargs}
    return compare(model, tiny_model.tokenizer(), prompt, config, policy, on_layer=seen.append, **kwargs), seen


@torch.no_grad()
def log_probs(model, prompt):
    return model(prompt).logits[0].double().log_softmax(-1)


def test_keeping_everything_agrees_in_everything():
    found, _ = run(tiny_model.model(), EVERYTHING)
    assert found.density == 1.0
    assert found.top1_agreement == 1.0
    assert found.mean_kl_nats == pytest.approx(0, abs=1e-6)
    assert found.stem.perplexity == pytest.approx(found.dense.perplexity, rel=1e-5)
    assert found.stem.answer == found.dense.answer


def test_fidelity_is_that_of_the_full_logits(monkeypatch):
    # Few rows at a time, so that chunks and their seams are exercised.
    monkeypatch.setattr("stem_attn.lab.logits._LOGITS_BYTES", 4 * 257 * 7)
    model, prompt = tiny_model.model(), ids()
    found, _ = run(model, SPARSE, prompt)
    dense = log_probs(model, prompt)
    hf.enable(model, SPARSE, policy=POLICY)
    stem = log_probs(model, prompt)
    stats = hf.stats(model)
    hf.disable(model)

    assert found.density == stats.density < 0.5
    assert found.sparse_layers == 2
    kl = F.kl_div(stem, dense, log_target=True, reduction="none").sum(-1).mean().item()
    assert kl > 1e-3
    assert found.mean_kl_nats == pytest.approx(kl, rel=1e-3)
    assert found.top1_agreement == (dense.argmax(-1) == stem.argmax(-1)).double().mean().item()
    for side, logs in ((found.dense, dense), (found.stem, stem)):
        nll = F.nll_loss(logs[:-1], prompt[0, 1:]).exp().item()
        assert side.perplexity == pytest.approx(nll, rel=1e-4)


def test_fidelity_counts_what_a_model_does_to_its_logits():
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, logits_scaling=5.0,
        bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    model, prompt = GraniteForCausalLM(config).eval(), ids()
    found, _ = run(model, SPARSE, prompt)
    nll = F.nll_loss(log_probs(model, prompt)[:-1], prompt[0, 1:]).exp().item()
    assert found.dense.perplexity == pytest.approx(nll, rel=1e-4)


def test_answers_are_the_greedy_continuations():
    model, prompt = tiny_model.model(), ids()
    found, _ = run(model, SPARSE, prompt)

    def greedy():
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        return tiny_model.tokenizer().decode(tokens, skip_special_tokens=True)

    assert found.dense.answer == greedy()
    hf.enable(model, SPARSE, policy=POLICY)
    assert found.stem.answer == greedy()
    hf.disable(model)
    assert found.dense.answer


def test_measurements_hang_together_and_the_model_is_restored():
    model = tiny_model.model()
    found, seen = run(model, SPARSE, rounds=3)
    for side in (found.dense, found.stem):
        assert len(side.rounds_seconds) == 3
        assert side.prefill_seconds == min(side.rounds_seconds)
        assert 0 < side.attention_seconds < side.prefill_seconds
        assert side.peak_bytes >= 0
    prefills = ["warm-up", *(f"{side} {number}/3" for number in (1, 2, 3) for side in ("dense", "stem"))]
    assert seen == [name for name in prefills for _ in range(2)]  # once a layer
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in model.model.__dict__
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    assert "stem" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_nothing_sparse_is_an_error():
    with pytest.raises(InputError, match="no layer ran sparse"):
        run(tiny_model.model(), SPARSE, policy=PrefillPolicy(dense_layers=(0, 1), min_seq_len=64))
