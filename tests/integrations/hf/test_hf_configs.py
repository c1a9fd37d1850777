"""Whose config is switched: models may share a config object, and each is enabled and disabled on its own."""

import copy
import pickle

import pytest
import torch
from test_hf_enable import implementations, tiny_vlm, untouched
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, StaticCache

from hf_models import KEEP_ALL, SPARSE, enable, relative_error, tiny_config, tiny_model, tokens
from stem_attn.integrations import hf

LENGTH = 200


def two_models(before="sdpa"):
    config = tiny_config("llama")
    config._attn_implementation = before
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()


def logits(model, **inputs):
    with torch.no_grad():
        return model(tokens(2, LENGTH), **inputs).logits


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_models_with_one_config_switch_one_by_one(before):
    one, other = two_models(before)
    shared, expected = one.config, logits(other)
    enable(one, SPARSE)
    assert untouched(other)
    assert torch.equal(logits(other), expected)
    with pytest.raises(ValueError, match="not enabled"):
        hf.stats(other)
    enable(other, KEEP_ALL)
    logits(one), logits(other)
    assert hf.stats(one).density < hf.stats(other).density == 1.0
    hf.disable(one)
    assert set(implementations(one)) == {before}
    assert hf.stats(other).sparse == 2
    logits(other)
    assert hf.stats(other).sparse == 4
    hf.disable(other)
    assert one.config is other.config is other.model.layers[0].self_attn.config is shared
    assert torch.equal(logits(other), expected)


def test_changes_of_the_config_are_kept():
    one, other = two_models()
    enable(one, SPARSE)
    one.config.use_cache = False
    assert other.config.use_cache
    hf.disable(one)
    assert not one.config.use_cache
    assert one.config is one.model.config is one.model.layers[0].self_attn.config
    assert untouched(one)


def test_a_model_made_from_an_enabled_models_config_is_dense():
    one, _ = two_models()
    enable(one, SPARSE)
    expected = logits(tiny_model("llama"))
    torch.manual_seed(0)
    new = LlamaForCausalLM(one.config).eval()
    assert torch.equal(logits(new), expected)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :37] = 0
    assert (
        relative_error(
            logits(new, attention_mask=mask)[mask.bool()], logits(tiny_model("llama"), attention_mask=mask)[mask.bool()]
        )
        < 1e-6
    )
    hf.disable(one)
    assert torch.equal(logits(new), expected)


def test_models_that_share_modules_agree():
    inner = tiny_model("llama").model
    head, bare = LlamaForSequenceClassification(inner.config), LlamaForCausalLM(inner.config)
    head.model = bare.model = inner
    enable(bare.eval(), SPARSE)
    expected = logits(bare)
    assert hf.stats(bare).sparse == 2
    with torch.no_grad():
        head.eval()(tokens(2, LENGTH))
    assert hf.stats(bare).sparse == 4  # its modules are the enabled ones
    hf.disable(bare)
    assert untouched(head)
    assert relative_error(logits(bare), expected) > 1e-3


def test_a_part_enabled_by_itself_stays_right_within_the_whole():
    model, ids = tiny_vlm(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = {cache: model.generate(ids, **options, cache_implementation=cache) for cache in (None, "static")}
    part = model.model.language_model
    enable(part, KEEP_ALL)
    for cache, sequence in expected.items():
        assert torch.equal(model.generate(ids, **options, cache_implementation=cache), sequence)
    with torch.no_grad():
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=LENGTH + 9)
        plain = model(input_ids=ids).logits
        assert relative_error(model(input_ids=ids, past_key_values=static).logits, plain) < 1e-5
    hf.disable(part)
    assert untouched(model)


def test_the_whole_after_a_part_and_back():
    model, ids = tiny_vlm(), tokens(1, LENGTH)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        enable(model.model.language_model, SPARSE)
        enable(model, KEEP_ALL)
        assert relative_error(model(input_ids=ids).logits, expected) < 1e-4
    assert hf.stats(model).calls == 2
    hf.disable(model)
    assert untouched(model)
    assert set(implementations(model)) == {"sdpa"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_configs_of_their_own(duplicate):
    one, other = two_models()
    enable(one, SPARSE)
    twin = duplicate(one)
    hf.disable(one)
    logits(twin)
    assert hf.stats(twin).sparse == 2
    hf.disable(twin)
    assert untouched(twin)
    assert twin.config is twin.model.layers[1].self_attn.config
    assert untouched(other)


def test_a_base_model_of_its_own_is_enabled_too():
    model = LlamaModel(tiny_config("llama")).eval()
    enable(model, SPARSE)
    with torch.no_grad():
        model(tokens(1, LENGTH))
    assert hf.stats(model).sparse == 2
