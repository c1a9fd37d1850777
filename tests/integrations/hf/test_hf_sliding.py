"""Sliding-window layers: an exact band in the prefill, and the windowed mask on every dense call."""

import pytest
import torch
from test_hf_families import KINDS, LENGTH, run
from transformers import DynamicCache

from hf_models import BLOCK, KEEP_ALL, enable, relative_error, tiny_model, tokens
from stem_attn import StemConfig
from stem_attn.integrations import hf

HYBRID = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "gemma3_text": HYBRID,
    "cohere2": HYBRID,
    "qwen2": {**HYBRID, "use_sliding_window": True},
    "qwen2_moe": {**HYBRID, "use_sliding_window": True},
}


@pytest.mark.parametrize("window", [40, 16, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_band_equals_sdpa(family, window):
    model, ids = tiny_model(family, sliding_window=window, **FAMILIES[family]), tokens(2, LENGTH)
    expected = {kind: run(model, ids, kind) for kind in KINDS}
    enable(model, KEEP_ALL)
    for kind in KINDS:
        hf.reset_stats(model)
        error = relative_error(run(model, ids, kind), expected[kind])
        assert error < 1e-4, (kind, error)
        stats = hf.stats(model)
        banded_layers = 1 if FAMILIES[family] else 2
        assert stats.banded == stats.calls * banded_layers / 2 > 0
        assert stats.sparse == stats.calls - stats.banded
        assert stats.tokens["banded"] > 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_short_prompts_get_the_windowed_mask(kind):
    model, ids = tiny_model("gemma3_text", sliding_window=40), tokens(2, LENGTH)
    expected = run(model, ids, kind)
    enable(model, StemConfig(block_size=BLOCK), min_seq_len=4096)
    assert relative_error(run(model, ids, kind), expected) < 1e-6
    stats = hf.stats(model)
    assert stats.dense == {"short prompt": stats.calls}


@torch.no_grad()
def test_decode_and_short_steps_see_the_window():
    model, ids = tiny_model("mistral", sliding_window=40), tokens(1, 120)
    expected = model(ids).logits
    enable(model, KEEP_ALL)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([100, 1, 5, 14], dim=1)]
    assert relative_error(torch.cat(parts, 1), expected) < 1e-4
    assert hf.stats(model).dense == {"decode": 6}


@torch.no_grad()
def test_a_window_wider_than_the_prompt_is_full_attention():
    model = enable(tiny_model("mistral", sliding_window=LENGTH), KEEP_ALL)
    model(tokens(1, LENGTH))
    assert hf.stats(model).sparse == 2
    with hf.prompt_length(model, LENGTH + 1):  # but the whole prompt is not
        model(tokens(1, LENGTH))
    assert hf.stats(model).banded == 2


@torch.no_grad()
def test_a_band_stands_for_dense_in_dense_layers():
    model = tiny_model("gemma3_text", sliding_window=40)
    enable(model, StemConfig(block_size=BLOCK), dense_layers=(0, -1))
    model(tokens(1, LENGTH))
    assert hf.stats(model).banded == 1
    assert hf.stats(model).dense == {"dense layer": 1}


@torch.no_grad()
def test_padding_between_tokens_gets_the_windowed_mask():
    model, ids = tiny_model("gemma3_text", sliding_window=40), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 50:60] = 0
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    enable(model, KEEP_ALL)
    assert relative_error(model(ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-6
    assert hf.stats(model).dense == {"padding between tokens": 2}
