"""Autocast: q and k come as float32 from the rotary embedding, v in half precision; SDPA casts, and so do we."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_models import (
    FAMILIES,
    KEEP_ALL,
    SPARSE,
    enable,
    relative_error,
    skip_where_models_cannot_be_traced,
    tiny_model,
    tokens,
)
from stem_attn.integrations import hf

LENGTH = 200


def logits(model, ids, dtype, use_cache):
    with torch.autocast("cpu", dtype=dtype):
        return model(ids, use_cache=use_cache).logits


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_everything_kept_equals_sdpa(family, dtype, use_cache):
    extra = {"sliding_window": 40} if family == "gemma3_text" else {}
    model, ids = tiny_model(family, **extra), tokens(2, LENGTH)
    exact, expected = model(ids).logits, logits(model, ids, dtype, use_cache)
    enable(model, KEEP_ALL)
    actual = logits(model, ids, dtype, use_cache)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, exact) < 2 * relative_error(expected, exact)
    assert hf.stats(model).sparse + hf.stats(model).banded == hf.stats(model).calls > 0


@torch.no_grad()
def test_blocks_are_scored_outside_of_autocast():
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    half = tiny_model("llama").to(torch.bfloat16)
    enable(half, SPARSE)(ids)
    enable(model, SPARSE)
    logits(model, ids, torch.bfloat16, use_cache=True)
    assert hf.stats(model).density == hf.stats(half).density < 0.7


@pytest.mark.parametrize("least", [4096, 0])
@torch.no_grad()
def test_short_prompts_and_decode_equal_sdpa_bit_for_bit(least):
    model, ids = tiny_model("llama"), tokens(1, 12)
    expected = logits(model, ids, torch.bfloat16, use_cache=True)
    enable(model, SPARSE, min_seq_len=least)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not least:  # a block is longer
            cache = model(ids[:, :8]).past_key_values
            step = model(ids[:, 8:], past_key_values=cache).logits
            assert hf.stats(model).dense["decode"] == 2
            assert relative_error(step.float(), expected[:, 8:].float()) < 2e-2
        else:
            assert torch.equal(model(ids).logits, expected)


def test_autocast_with_generate_and_full_graphs():
    skip_where_models_cannot_be_traced()
    torch._dynamo.reset()
    model, ids = enable(tiny_model("llama"), SPARSE), tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, :20] = 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        expected = model(ids, attention_mask=mask).logits
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        actual = run(ids, attention_mask=mask).logits
    assert relative_error(actual[:, 20:].float(), expected[:, 20:].float()) < 1e-3
    assert hf.stats(model).sparse == 6


def test_trainer_evaluates_in_bfloat16(tmp_path):
    model = tiny_model("llama")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, LENGTH)]
    options = {"per_device_eval_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": True}
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), eval_dataset=rows)
    expected = trainer.evaluate()["eval_loss"]
    enable(model, KEEP_ALL)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert hf.stats(model).sparse == 4
