"""Compact masks: what they say, and masks that no call can have."""

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from hf_models import KEEP_ALL, enable, relative_error, tiny_model, tokens
from stem_attn.integrations import hf
from stem_attn.integrations.hf import masks

# (tokens seen before, queries, first key held, keys held, window)
CALLS = {
    "plain": (0, 9, 0, 9, None),
    "prefix": (5, 4, 0, 9, None),
    "static": (5, 4, 0, 14, None),
    "window": (0, 9, 0, 9, 3),
    "sliding cache": (7, 5, 5, 7, 3),
    "sliding cache, not full": (2, 3, 0, 6, 6),
}
PADDING = {"none": [[1] * 12] * 2, "left": [[1] * 12, [0] * 4 + [1] * 8], "between": [[1, 0, 1] * 4, [1] * 12]}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("call", CALLS)
def test_a_compact_mask_says_what_sdpas_says(call, padding):
    before, q_len, first, held, window = CALLS[call]
    seen = before + q_len
    told = torch.tensor(PADDING[padding])[:, :seen] if padding != "none" else None
    sizes = {"batch_size": 2, "q_length": q_len, "kv_length": held, "q_offset": before, "kv_offset": first}
    function = {} if window is None else {"mask_function": sliding_window_causal_mask_function(window)}
    padded = None if told is None else told.bool()
    expected = sdpa_mask(**sizes, **function, attention_mask=padded, local_size=window, allow_is_causal_skip=False)
    mask = masks.stem_mask(**sizes, **function, attention_mask=padded, local_size=window)
    if call == "plain" and padding == "none":
        assert mask is None
        return
    assert masks.is_compact(mask)
    for cut in (mask, mask.clone(), mask[:, :, -2:, :]):  # as it was made, and as models and devices change it
        read = masks.layout(cut, 2, q_len)
        assert (read.seen, read.held, read.present, read.window) == (seen, held, seen - first, window)
        dense = masks.to_dense(cut, q_len)
        if dense is None:
            dense = torch.ones(q_len, seen, dtype=torch.bool).tril()
        assert torch.equal(dense.expand(2, 1, q_len, -1), expected[..., : seen - first])
        assert not expected[..., seen - first :].any()
        assert torch.equal(masks.to_dense_traced(cut, q_len, held), expected)


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("chunk", [40, 5, 1])
@torch.no_grad()
def test_layers_that_hold_unequal_numbers_of_tokens_are_refused(kind, chunk):
    extra = {"sliding_window": 1000} if kind == "window" else {}
    model, ids = enable(tiny_model("mistral" if extra else "llama", **extra), KEEP_ALL), tokens(1, 160 + chunk)
    cache = DynamicCache()
    model(ids[:, :160], past_key_values=cache)
    layer = cache.layers[1]  # compressed, as SDPA would refuse it
    layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    if chunk == 1:  # decode of a single token goes to SDPA, which needs no mask here
        assert model(ids[:, 160:], past_key_values=cache).logits.isfinite().all()
        return
    with pytest.raises(ValueError, match=f"layer 1 has keys of {80 + chunk} tokens, but its mask is for {160 + chunk}"):
        model(ids[:, 160:], past_key_values=cache)


@torch.no_grad()
def test_a_layer_that_holds_more_than_the_first_is_refused():
    model, ids = enable(tiny_model("llama"), KEEP_ALL), tokens(1, 200)
    cache = DynamicCache()
    model(ids[:, :160], past_key_values=cache)
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, :60], layer.values[:, :, :60]
    with pytest.raises(ValueError, match="layer 1 has keys of 200 tokens, but its mask is for 100"):
        model(ids[:, 160:], past_key_values=cache)


@pytest.mark.parametrize("chunk", [40, 5])
@torch.no_grad()
def test_a_cache_compressed_alike_in_all_layers_runs_as_with_sdpa(chunk):
    model, ids = tiny_model("llama"), tokens(1, 160 + chunk)

    def logits():
        cache = DynamicCache()
        model(ids[:, :160], past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
        positions = torch.arange(160, 160 + chunk)[None]
        return model(ids[:, 160:], position_ids=positions, past_key_values=cache).logits

    expected = logits()
    enable(model, KEEP_ALL)
    assert relative_error(logits(), expected) < 1e-4


@pytest.mark.parametrize("shape", [(200,), (1, 200, 200), (2, 200)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_masks_of_another_shape_are_refused(family, shape):
    model = enable(tiny_model(family), KEEP_ALL)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\] with batch 1, or 4-D; got \["):
        model(tokens(1, 200), attention_mask=torch.ones(shape, dtype=torch.long))
    assert hf.stats(model).calls == 0
