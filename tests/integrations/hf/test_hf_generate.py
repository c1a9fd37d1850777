"""generate() and caches: chunks, static caches, beams, assisted decoding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_models import BLOCK, KEEP_ALL, SPARSE, enable, relative_error, tiny_model, tokens
from stem_attn.integrations import hf

LENGTH = 200
GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 40}


def forward(model, ids, mask=None, *, cache=None, chunk=None):
    """Logits of a forward in chunks of `chunk` tokens."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        stop = min(start + (chunk or ids.shape[1]), ids.shape[1])
        seen = None if mask is None else mask[:, :stop]
        logits.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def left_padded(batch, pads):
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return mask


@pytest.mark.parametrize("chunk", [BLOCK, 4 * BLOCK, 7 * BLOCK])
@torch.no_grad()
def test_aligned_chunks_with_the_prompt_length_told_equal_one_shot(chunk):
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    expected = forward(model, ids)
    one_shot = hf.stats(model)
    hf.reset_stats(model)
    with hf.prompt_length(model, LENGTH):
        assert relative_error(forward(model, ids, chunk=chunk), expected) < 1e-5
    stats = hf.stats(model)
    assert stats.sparse == stats.calls == 2 * -(-LENGTH // chunk)
    assert stats.unknown_prompt_len == 0
    assert stats.density == pytest.approx(one_shot.density)


@torch.no_grad()
def test_padded_chunks_budget_each_row_by_its_own_length():
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(3, LENGTH)
    mask = left_padded(3, [0, 2 * BLOCK, 5 * BLOCK])  # chunk boundaries are block boundaries of every row
    real = mask.bool()
    expected = forward(model, ids, mask)[real]
    with hf.prompt_length(model, mask.sum(1)):
        assert relative_error(forward(model, ids, mask, chunk=4 * BLOCK)[real], expected) < 1e-5
    rows = [forward(model, ids[row : row + 1][:, real[row]])[0] for row in range(3)]  # each one alone, unpadded
    assert relative_error(expected, torch.cat(rows)) < 1e-5


@torch.no_grad()
def test_chunks_of_unknown_prompt_length_are_counted():
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    forward(model, ids, chunk=4 * BLOCK)
    stats = hf.stats(model)
    assert stats.unknown_prompt_len == 2 * 2  # of 64 + 64 + 64 + 8 tokens, the first sees no prefix, the last is short
    assert stats.dense == {"decode": 2}


@torch.no_grad()
def test_a_prompt_longer_than_told_is_an_error():
    model, ids = enable(tiny_model("llama"), SPARSE, prompt_len=100), tokens(1, LENGTH)
    with pytest.raises(ValueError, match=r"prompt_len says \[100\] tokens, but the prompt already has \[200\]"):
        model(ids)
    with (
        pytest.raises(ValueError, match="prompt_len has 3 rows, but the batch has 1"),
        hf.prompt_length(model, [9] * 3),
    ):
        model(ids)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_generate_in_chunks_equals_one_shot(family):
    extra = GEMMA if family == "gemma3_text" else {}
    model, ids = enable(tiny_model(family, **extra), SPARSE), tokens(2, LENGTH)
    inputs = {"input_ids": ids, "attention_mask": left_padded(2, [0, 2 * BLOCK]), "max_new_tokens": 8}
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    with hf.prompt_length(model, inputs["attention_mask"].sum(1)):
        chunked = model.generate(**inputs, **options, prefill_chunk_size=4 * BLOCK)
    assert torch.equal(chunked.sequences, expected.sequences)
    assert relative_error(torch.stack(chunked.logits), torch.stack(expected.logits)) < 1e-5
    assert hf.stats(model).dense["decode"] == 2 * 2 * 7


@pytest.mark.parametrize("chunk", [None, 4 * BLOCK])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_static_cache_equals_dynamic_cache(family, padded, chunk):
    extra = {"mistral": {"sliding_window": 40}, "gemma3_text": GEMMA}.get(family, {})
    model, ids = enable(tiny_model(family, **extra), SPARSE), tokens(2, LENGTH)
    mask = left_padded(2, [0, 37]) if padded else None
    expected = forward(model, ids, mask, chunk=chunk)
    dynamic = hf.stats(model)
    hf.reset_stats(model)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 50)
    actual = forward(model, ids, mask, cache=cache, chunk=chunk)
    real = slice(None) if mask is None else mask.bool()
    assert relative_error(actual[real], expected[real]) < 1e-5
    assert hf.stats(model) == dynamic
    assert dynamic.sparse + dynamic.banded > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_generate_with_a_static_cache_equals_sdpa(family):
    extra = {"mistral": {"sliding_window": 40}, "gemma3_text": GEMMA}.get(family, {})
    model, ids = tiny_model(family, **extra), tokens(2, LENGTH)
    options = {"attention_mask": left_padded(2, [0, 37]), "max_new_tokens": 6, "cache_implementation": "static"}
    expected = model.generate(ids, do_sample=False, **options)
    enable(model, KEEP_ALL)
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)
    assert hf.stats(model).sparse + hf.stats(model).banded == 2


@torch.no_grad()
def test_beam_search_equals_sdpa():
    model, ids = tiny_model("llama"), tokens(2, LENGTH)
    options = {"attention_mask": left_padded(2, [0, 37]), "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    enable(model, KEEP_ALL, prompt_len=[LENGTH, LENGTH - 37])  # two rows, six beams
    assert torch.equal(model.generate(ids, **options), expected)
    assert hf.stats(model).sparse == 2


@torch.no_grad()
def test_assisted_decoding_equals_sdpa():
    model, assistant, ids = tiny_model("llama"), tiny_model("llama", num_hidden_layers=1), tokens(1, LENGTH)
    options = {"assistant_model": assistant, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    enable(model, KEEP_ALL)
    assert torch.equal(model.generate(ids, **options), expected)
    stats = hf.stats(model)
    assert stats.sparse == 2
    assert stats.dense == {"decode": stats.calls - 2}


@torch.no_grad()
def test_drafted_tokens_may_follow_a_prompt_whose_length_is_told():
    model, ids = tiny_model("llama"), tokens(1, LENGTH // 4).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": BLOCK // 2, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, **options)
    enable(model, KEEP_ALL)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with hf.prompt_length(model, LENGTH):
        assert torch.equal(model.generate(ids, **options), expected)
    assert LENGTH < seen[0] < LENGTH + BLOCK  # the prompt and its first drafts in one call
    stats = hf.stats(model)
    assert stats.sparse == 2
    assert stats.dense == {"decode": stats.calls - 2}


@torch.no_grad()
def test_continuous_batching_is_unsupported():
    model = enable(tiny_model("llama"), SPARSE)
    with pytest.raises(ValueError, match=r"stem.* is not supported"):
        model.generate_batch([tokens(1, 9)[0].tolist()], progress_bar=False)
