"""torch.compile: one opaque operator per layer, decided when the graph runs.

Without a cache and a padding mask transformers traces a mask for packed sequences, and such calls are dense.
"""

import pytest
import torch
from transformers import CompileConfig

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

LENGTH = 200


@pytest.fixture(autouse=True)
def _fresh():
    skip_where_models_cannot_be_traced()
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("gemma3_text", True)])
@torch.no_grad()
def test_full_graph_equals_eager(family, padded):
    extra = {"sliding_window": 40} if family == "gemma3_text" else {}
    model, ids = enable(tiny_model(family, **extra), SPARSE), tokens(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :37] = 0
    inputs = {"attention_mask": mask} if padded else {}
    real = mask.bool() if padded else slice(None)
    expected = model(ids, **inputs).logits
    eager = hf.stats(model)
    hf.reset_stats(model)
    run = compiled(model)
    assert relative_error(run(ids, **inputs).logits[real], expected[real]) < 1e-5
    assert hf.stats(model) == eager
    assert eager.sparse + eager.banded == 2


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch cannot be told")
def test_torch_is_told_that_no_cuda_graph_may_record_the_operator():
    assert torch.Tag.cudagraph_unsafe in torch.ops.stem_attn.hf_prefill.default.tags


@torch.no_grad()
def test_settings_are_read_when_the_graph_runs():
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    run = compiled(model)
    run(ids)
    with hf.prompt_length(model, 3 * LENGTH):
        expected = model(ids).logits
        assert relative_error(run(ids).logits, expected) < 1e-5
    assert hf.stats(model).sparse == 6


@torch.no_grad()
def test_short_prompts_and_a_cached_prefix_under_compile():
    model, ids = enable(tiny_model("llama"), StemConfig(block_size=BLOCK), min_seq_len=150), tokens(1, LENGTH)
    cache = model(ids[:, :120], use_cache=True).past_key_values
    expected = model(ids[:, 120:], past_key_values=cache).logits
    cache.crop(-(LENGTH - 120))
    hf.reset_stats(model)
    run = compiled(model)
    run(ids[:, :120])
    assert hf.stats(model).dense == {"short prompt": 2}
    assert relative_error(run(ids[:, 120:], past_key_values=cache).logits, expected) < 1e-5
    assert hf.stats(model).sparse == 2


def test_training_under_compile_is_dense():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), model.lm_head.weight)[0]
    enable(model, SPARSE)
    run = compiled(model)
    actual = torch.autograd.grad(run(ids, use_cache=False).logits.square().mean(), model.lm_head.weight)[0]
    assert relative_error(actual, expected) < 1e-5
    assert hf.stats(model).sparse == 0


@pytest.mark.parametrize(("family", "chunk"), [("mistral", 4 * BLOCK), ("gemma3_text", None)])
@torch.no_grad()
def test_generate_compiles_its_steps(family, chunk):
    model, ids = tiny_model(family, sliding_window=40), tokens(2, 10 * BLOCK)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    steps = CompileConfig(backend="eager", fullgraph=True, mode=None)
    steps._compile_all_devices = True
    inputs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **inputs)
    enable(model, KEEP_ALL)
    actual = model.generate(ids, **inputs, prefill_chunk_size=chunk, compile_config=steps)
    assert torch.equal(actual, expected)
