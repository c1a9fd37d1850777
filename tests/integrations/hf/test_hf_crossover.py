"""Automatic dense where sparse would not be faster."""

import logging

import pytest
import torch

import hf_models
from hf_models import BLOCK, KEEP_ALL, relative_error, tiny_model, tokens
from stem_attn import PrefillPolicy, StemConfig, select_blocks
from stem_attn.backends.base import Geometry
from stem_attn.backends.cpu import CpuBackend
from stem_attn.backends.triton import TritonBackend
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.integrations import hf
from stem_attn.selection import most_kept

LENGTH = 400
REASON = "no gain from sparsity"


def with_ratio(ratio, **fields):
    return StemConfig(block_size=BLOCK, stride=4, budget_ratio=ratio, budget_bias=1, tail_blocks=0, **fields)


def enable(model, config, **options):
    """At any length, but dense where sparse would not be faster."""
    return hf_models.enable(model, config, crossover=True, **options)


FEW = with_ratio(0.1)  # density 0.22
MANY = with_ratio(0.5)  # density 0.71


def bound(config, length, prompt_len=None, q_len=None):
    grid = BlockGrid(q_len or length, length, config.block_size)
    kept = most_kept(budget_of(config, (prompt_len or length,)).rows(grid), grid, config)
    return int(kept.sum()) / grid.causal_blocks


@pytest.mark.parametrize("forced_blocks", ["inside", "on_top"])
@pytest.mark.parametrize(("q_len", "prompt_len"), [(LENGTH, LENGTH), (150, LENGTH), (150, 2 * LENGTH)])
def test_the_bound_is_the_density_or_above_it(forced_blocks, q_len, prompt_len):
    for ratio in (0.0, 0.1, 0.5):
        config = with_ratio(ratio, forced_blocks=forced_blocks, sink_blocks=2, local_blocks=3)
        q, k, v = torch.randn(1, 2, q_len, 16), torch.randn(1, 1, LENGTH, 16), torch.randn(1, 1, LENGTH, 16)
        density = select_blocks(q, k, v, config=config, prompt_len=prompt_len).density()
        most = bound(config, LENGTH, prompt_len, q_len)
        assert most == density if forced_blocks == "inside" else density <= most < density + 0.25


@pytest.mark.parametrize(
    ("device_type", "preset", "tokens", "faster"),
    [
        ("cpu", "default", 4096, False),
        ("cpu", "default", 16384, True),
        ("cpu", "official", 16384, False),
        ("cpu", "official", 65536, True),
        ("cuda", "default", 4095, False),
        ("cuda", "default", 8191, False),
        ("cuda", "default", 8192, True),
        ("cuda", "paper", 8191, False),
        ("cuda", "official", 8192, True),
        ("cuda", "paper", 8192, False),
        ("cuda", "paper", 16384, True),
    ],
)
def test_presets_by_device_and_length(device_type, preset, tokens, faster):
    backend = TritonBackend() if device_type == "cuda" else CpuBackend()
    calls = [(tokens, BlockGrid(tokens, tokens, 128))]
    # float32 on CPUs: for bfloat16 the break-even depends on whether this processor has matrix units
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    geometry = Geometry(device_type, dtype, 128, 0)
    reason = PrefillPolicy(min_seq_len=0).why_dense(StemConfig.preset(preset), calls, None, backend, geometry)
    assert reason == (None if faster else REASON)


def test_8_bits_pay_where_mass_scores_do():
    """They take launches more, too."""
    for length, density in ((4096, 0.0), (8191, 0.0), (8192, 0.7), (16384, 0.85)):
        geometry = Geometry("cuda", torch.bfloat16, 128, length)
        for fields in ({}, {"precision": "fp8"}):
            assert TritonBackend().break_even(geometry, StemConfig.preset("default", **fields)) == density
        plain, eight = StemConfig.preset("official"), StemConfig.preset("official", precision="fp8")
        assert TritonBackend().break_even(geometry, eight) == density < TritonBackend().break_even(geometry, plain)


@pytest.mark.parametrize(("config", "faster"), [(FEW, True), (MANY, False), (KEEP_ALL, False)])
@torch.no_grad()
def test_a_model_goes_dense_above_the_crossover(config, faster):
    assert (bound(config, LENGTH) < 0.5) == faster
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    expected = model(ids).logits
    enable(model, config)
    for seed in (1, 2):  # whatever the values are
        logits = model(tokens(1, LENGTH, seed)).logits
        assert (hf.stats(model).sparse, hf.stats(model).dense) == ((2, {}) if faster else (0, {REASON: 2}))
        if seed == 1:
            assert torch.equal(logits, expected) == (not faster)
        hf.reset_stats(model)
    hf_models.enable(model, config)
    model(ids)
    assert (hf.stats(model).sparse, hf.stats(model).dense) == (2, {})


@torch.no_grad()
def test_chunks_of_a_told_prompt_are_decided_alike():
    ids, chunk = tokens(1, LENGTH), 10 * BLOCK
    assert bound(MANY, LENGTH, q_len=LENGTH - 2 * chunk) < 0.5 < bound(MANY, LENGTH)  # the last chunk by itself
    for config, dense in ((FEW, 0), (MANY, 6)):
        model = enable(tiny_model("llama"), config, prompt_len=LENGTH)
        expected = model(ids).logits
        hf.reset_stats(model)
        cache, parts = None, []
        for part in ids.split(chunk, dim=1):
            result = model(part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(result.logits)
        assert relative_error(torch.cat(parts, 1), expected) < 1e-5
        assert hf.stats(model).dense == ({REASON: dense} if dense else {})


@torch.no_grad()
def test_a_chunk_that_keeps_everything_is_dense():
    model, ids = enable(tiny_model("llama"), FEW), tokens(1, LENGTH)
    with hf.prompt_length(model, LENGTH):
        model(ids[:, : 2 * BLOCK])
        assert hf.stats(model).dense == {REASON: 2}
        model(ids[:, : 10 * BLOCK])
    assert hf.stats(model).sparse == 2
    model(ids[:, : 2 * BLOCK])  # a prompt of its own now
    assert hf.stats(model).dense == {REASON: 4}


@torch.no_grad()
def test_padded_rows_are_decided_together():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : LENGTH - 3 * BLOCK] = 0
    model, ids = enable(tiny_model("llama"), FEW), tokens(2, LENGTH)
    model(ids, attention_mask=mask)  # the short row keeps everything, the long one has nearly all the work
    assert hf.stats(model).sparse == 2
    assert model(ids, attention_mask=torch.zeros_like(mask)).logits.isfinite().all()
    enable(model, MANY)
    model(ids, attention_mask=mask)
    assert hf.stats(model).dense == {REASON: 2}


@torch.no_grad()
def test_bands_are_left_alone():
    model = enable(tiny_model("mistral", sliding_window=40), KEEP_ALL)
    model(tokens(1, LENGTH))
    assert (hf.stats(model).banded, hf.stats(model).dense) == (2, {})


@torch.no_grad()
def test_the_reason_is_no_warning(caplog):
    with caplog.at_level(logging.INFO, "stem_attn.hf"):
        enable(tiny_model("llama"), KEEP_ALL)(tokens(1, LENGTH))
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", f"dense attention: {REASON} (said once per model)")
    ]
