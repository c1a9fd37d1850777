"""Models whose last layers share keys, and may see the last queries only (Gemma 3n, Gemma 4)."""

import pytest
import torch
from test_hf_families import KINDS, LENGTH, run
from transformers import StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_models import BLOCK, KEEP_ALL, SPARSE, enable, relative_error, tiny_model, tokens
from stem_attn.integrations import hf

LAYERS = ["sliding_attention", "full_attention"]
SHARING = {
    "num_hidden_layers": 4,
    "layer_types": LAYERS * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 40,
}
GEMMA4 = {**SHARING, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "global_head_dim": 32}
MODELS = {
    "gemma3n_text": {**SHARING, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {**SHARING, "global_head_dim": 32},
}


@pytest.fixture(params=MODELS)
def model(request):
    if request.param not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    return tiny_model(request.param, **MODELS[request.param])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_everything_kept_equals_sdpa(model, kind):
    ids = tokens(2, LENGTH)
    expected = run(model, ids, kind)
    enable(model, KEEP_ALL)
    assert relative_error(run(model, ids, kind), expected) < 1e-4
    stats = hf.stats(model)
    assert stats.sparse == stats.banded == stats.calls / 2  # layers that share keys too


@pytest.mark.parametrize("kept", [1, 5, BLOCK + 3])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_the_last_logits_alone_equal_sdpa(model, kept, padded):
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    inputs = {"attention_mask": mask} if padded else {}
    expected = model(ids, **inputs).logits[:, -kept:]
    enable(model, KEEP_ALL)
    assert relative_error(model(ids, logits_to_keep=kept, **inputs).logits, expected) < 1e-4


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4 * BLOCK}, {"cache_implementation": "static"}])
@torch.no_grad()
def test_generate_equals_sdpa(model, options):
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    inputs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    inputs["return_dict_in_generate"] = True
    expected = model.generate(ids, **inputs, **options)
    enable(model, KEEP_ALL)
    actual = model.generate(ids, **inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert relative_error(torch.stack(actual.logits), torch.stack(expected.logits)) < 1e-4
    assert hf.stats(model).sparse > 0


@torch.no_grad()
def test_short_steps_after_a_prompt_equal_sdpa(model):
    ids = tokens(1, LENGTH)
    expected = model(ids).logits
    enable(model, KEEP_ALL)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 20)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([150, 1, 9, 40], dim=1)]
    assert relative_error(torch.cat(parts, 1), expected) < 1e-4


@torch.no_grad()
def test_sparse_layers_that_share_keys_select_for_themselves(model):
    enable(model, SPARSE)
    model(tokens(1, LENGTH))
    assert hf.stats(model).sparse == 2
    assert hf.stats(model).density < 0.7
