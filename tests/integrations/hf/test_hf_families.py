"""Every family through the adapter: everything kept equals SDPA, and really sparse equals Stem on the same q, k, v."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_models import FAMILIES, KEEP_ALL, SPARSE, enable, relative_error, tiny_model, tokens
from stem_attn import stem_attention
from stem_attn.integrations import hf

LENGTH = 200
LEFT, RIGHT = 37, 150  # row 1 starts at token 37; row 0 ends at token 150


def padding(kind):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if kind == "left":
        mask[1, :LEFT] = 0
    elif kind == "right":
        mask[0, RIGHT:] = 0
    return mask


def run(model, ids, kind):
    """Logits of the real tokens."""
    if kind == "prefix":  # the second part sees 120 cached tokens
        cache = model(ids[:, :120], use_cache=True).past_key_values
        return model(ids[:, 120:], past_key_values=cache).logits.flatten(0, 1)
    if kind == "plain":
        return model(ids).logits.flatten(0, 1)
    out = model(ids, attention_mask=padding(kind)).logits
    assert out.isfinite().all()
    return out[padding(kind).bool()]


KINDS = ["plain", "left", "right", "prefix"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_everything_kept_equals_sdpa(family):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    expected = {kind: run(model, ids, kind) for kind in KINDS}
    enable(model, KEEP_ALL)
    for kind in KINDS:
        hf.reset_stats(model)
        error = relative_error(run(model, ids, kind), expected[kind])
        assert error < 1e-4, (kind, error)
        stats = hf.stats(model)
        assert stats.sparse == stats.calls > 0, (kind, stats)
        assert stats.density == 1.0


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_really_sparse_is_stem_on_the_same_inputs(family, kind, monkeypatch):
    model, ids = enable(tiny_model(family), SPARSE), tokens(2, LENGTH)
    calls, adapter = [], ALL_ATTENTION_FUNCTIONS["stem"]

    def spy(module, query, key, value, mask, **kwargs):
        out = adapter(module, query, key, value, mask, **kwargs)
        calls.append((query, key, value, kwargs["scaling"], out[0]))
        return out

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "stem", spy)
    run(model, ids, kind)
    stats = hf.stats(model)
    assert stats.sparse == stats.calls == len(calls) > 0
    assert stats.density < 0.7
    first = {"left": [0, LEFT]}.get(kind, [0, 0])
    end = {"right": [RIGHT, LENGTH]}.get(kind, [LENGTH, LENGTH])
    for q, k, v, scale, out in calls:
        offset = k.shape[2] - q.shape[2]
        for row in range(2):
            keys = slice(first[row], min(end[row], k.shape[2]))
            queries = slice(max(keys.start - offset, 0), keys.stop - offset)
            part = (x[row : row + 1] for x in (q[:, :, queries], k[:, :, keys], v[:, :, keys]))
            expected = stem_attention(*part, config=SPARSE, scale=scale).transpose(1, 2)
            assert relative_error(out[row, queries], expected[0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunked_attention_layers_stay_dense_beyond_a_chunk(kind):
    model = tiny_model("llama4_text", attention_chunk_size=64)
    ids = tokens(2, LENGTH)
    expected = run(model, ids, kind)
    enable(model, KEEP_ALL)
    assert relative_error(run(model, ids, kind), expected) < 1e-4
    stats = hf.stats(model)
    assert stats.sparse == stats.dense["4-D mask"] == stats.calls / 2
