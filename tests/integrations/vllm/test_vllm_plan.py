"""What the vLLM plugin decides without vLLM: the plan of a step, its settings, which layers are dense."""

import json
import math
from itertools import pairwise

import pytest
import torch

from stem_attn import PrefillPolicy, StemConfig, backends
from stem_attn.backends.base import Geometry
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.config import PRESETS
from stem_attn.integrations.vllm.layers import layer_config, layer_index, table, why_dense
from stem_attn.integrations.vllm.plan import Request, Rest, Span, Split, runs_of, split_batch
from stem_attn.integrations.vllm.settings import Settings, choices, choose, describe, parse

CONFIG = StemConfig(block_size=16, stride=4, budget_ratio=0.1, budget_bias=1, tail_blocks=0)
CPU = backends.by_name("cpu"), Geometry("cpu", torch.float32, 64, 0)


SERVER = Settings(CONFIG, PrefillPolicy(min_seq_len=100, crossover=False), "default")


def request(q_start, q_len, k_len, prefilling, prompt_len, settings=SERVER):
    return Request(q_start, q_len, k_len, prefilling, prompt_len, settings)


def span(*places):
    return Span(*places, SERVER)


def split(*requests, dense=(), decode_len=1):
    return split_batch(requests, dense, *CPU, decode_len)


def test_a_mixed_batch_is_taken_apart():
    decode = request(0, 1, 1502, False, 1400)
    chunk = request(1, 153, 700, True, 2000)
    short = request(154, 33, 33, True, 33)
    got = split(decode, chunk, short)
    assert got.spans == (span(1, 1, 153, 700, 2000),)
    assert got.spans[0].tokens == slice(1, 154)
    assert got.rests == (Rest(0, 0, 1), Rest(2, 154, 33))
    assert got.reasons == {"decode": 1, "short prompt": 33}
    assert got.unknown_prompt_len_tokens == 0


def test_an_answer_computed_again_is_dense_as_it_was_the_first_time():
    # Preempted after 30 tokens of answer: the step holds the end of the prompt and the answer.
    got = split(request(5, 80, 430, True, 400))
    assert got.spans == (span(0, 5, 50, 400, 400),)
    assert got.rests == (Rest(0, 55, 30),)
    assert got.reasons == {"decode": 30}
    assert split(request(0, 20, 430, False, 400)).spans == ()


def test_without_a_told_length_a_chunk_is_budgeted_by_what_is_seen():
    got = split(request(0, 50, 430, True, None), request(50, 4, 430, False, None))
    assert got.spans == (span(0, 0, 50, 430, 430),)
    assert got.unknown_prompt_len_tokens == 50
    assert got.reasons == {"decode": 4}


def test_the_whole_prompt_decides_whether_it_is_short():
    assert split(request(0, 50, 50, True, 99)).reasons == {"short prompt": 50}
    assert split(request(0, 50, 50, True, 100)).spans == (span(0, 0, 50, 50, 100),)


def test_a_prompt_s_last_token_alone_is_a_decode():
    # vLLM may replay a decode's CUDA graph for it, which holds the dense parent.
    last, chunk = request(0, 1, 400, True, 400), request(1, 50, 400, True, 400)
    assert split(last, chunk) == Split((span(1, 1, 50, 400, 400),), (Rest(0, 0, 1),), {"decode": 1}, 0)
    # Speculation makes decodes longer: of drafted tokens, or of as many of a prompt.
    drafted, two = request(0, 4, 403, True, 400), request(4, 2, 400, True, 400)
    assert split(drafted, two, decode_len=4) == Split((), (Rest(0, 0, 4), Rest(1, 4, 2)), {"decode": 6}, 0)
    assert split(drafted, two).spans == (span(0, 0, 1, 400, 400), span(1, 4, 2, 400, 400))


def test_padded_rows_are_skipped():
    assert split(request(7, 0, 1, False, 12)).rests == ()


def test_the_crossover_is_told_by_the_whole_prompt():
    # 8 blocks and more of every row: nearly all of 10 blocks, few of 400. The same chunk, of two prompts.
    config = StemConfig(block_size=16, stride=4, budget_ratio=0.1, budget_bias=8, tail_blocks=0)
    short, long = (0, 16, 160, True, 160), (0, 16, 160, True, 6400)
    for part, crossover, reasons in (
        (short, True, {"no gain from sparsity": 16}),
        (short, False, {}),
        (long, False, {}),
        ((0, 640, 6400, True, 6400), True, {}),
    ):
        settings = Settings(config, PrefillPolicy(min_seq_len=100, crossover=crossover), "default")
        assert split(request(*part, settings)).reasons == reasons


def test_each_request_has_its_own_settings():
    other = Settings(CONFIG, PrefillPolicy(min_seq_len=800, crossover=False), "default")
    parts = [
        request(i * 200, 200, 700, True, 700, chosen) for i, chosen in enumerate((SERVER, other, "asked for", SERVER))
    ]
    got = split(*parts)
    assert got.spans == (span(0, 0, 200, 700, 700), span(3, 600, 200, 700, 700))
    assert got.rests == (Rest(1, 200, 200), Rest(2, 400, 200))
    assert got.reasons == {"short prompt": 200, "asked for": 200}
    # What layers do that are dense by the server's settings.
    got = split(*parts, request(800, 1, 701, False, 700), dense={SERVER})
    assert got.spans == ()
    assert got.reasons == {"dense layer": 400, "short prompt": 200, "asked for": 200, "decode": 1}


def test_what_a_request_may_choose():
    server = parse({"block_size": 64, "budget_scale": 0.5})
    assert choose(server, None) is server
    assert choose(server, "dense") is None
    assert choose(server, "official") == parse({"preset": "official"})
    assert choose(server, 2) == parse({"block_size": 64, "budget_scale": 1.0})
    assert choices(server) == [server, *(parse({"preset": name}) for name in PRESETS)]


@pytest.mark.parametrize("asked", ["fast", "", 0, -1, True, math.inf, math.nan, ["dense"], {"preset": "official"}])
def test_a_wrong_choice_is_refused(asked):
    known = r"'dense', a preset \(default, default-0.1, official, paper\) or a factor above 0"
    with pytest.raises(ValueError, match=rf"'stem' of a request must be {known} on the budget, got ") as refused:
        choose(parse({}), asked)
    assert str(refused.value).endswith(repr(asked))


@pytest.mark.parametrize("factor", [1e300, 1.7e308])
def test_a_factor_that_no_float_holds_keeps_everything(factor):
    """For every layer, whatever its share: nothing may raise while a server's step runs."""
    chosen = choose(parse({"budget_scale": 1e300}), factor)
    for layer in (0, 27):
        config = chosen.policy.layer_config(chosen.config, layer, 28)
        assert budget_of(config, (40_000,)).keeps_everything(BlockGrid(40_000, 40_000, 128))


def test_what_requests_choose_is_audited_as_the_server_says():
    target = {"audit_rows": 100, "min_recall": 0.9}
    server = parse({"budget_bias": 7, **target})
    for asked in ("official", 2.0, None):
        policy = choose(server, asked).policy
        assert (policy.audit_rows, policy.min_recall, policy.max_error) == (100, 0.9, None)
    assert choose(server, "official").policy.dense_layers == (0, 1)
    assert {settings.policy.audit_rows for settings in choices(server)} == {100}
    assert len(choices(server)) == 1 + len(PRESETS)
    assert choose(parse({}), "official").policy.audit_rows == 0


def test_a_target_that_its_rows_cannot_show_is_refused():
    with pytest.raises(ValueError, match=r"min_recall=0\.99 needs audit_rows of at least"):
        parse({"min_recall": 0.99, "audit_rows": 10})


def test_settings_come_from_the_preset_then_the_file_then_the_fields(tmp_path):
    assert parse({}) == Settings(StemConfig(), PrefillPolicy(), "default")
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"budget_bias": 7, "decay": 0.9}))
    got = parse({"preset": "official", "config_file": str(file), "decay": 0.8, "crossover": False})
    policy = PrefillPolicy.preset("official", crossover=False)
    assert got == Settings(StemConfig.preset("official", budget_bias=7, decay=0.8), policy, "official")
    assert describe(got) == "preset official with budget_bias=7, decay=0.8, crossover=False"
    assert describe(parse({})) == "preset default"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"budget_ration": 0.1},
            "unknown key budget_ration in .*; known: preset, config_file",
        ),
        ({"preset": "fast"}, "unknown preset 'fast'; known: default, default-0.1, official, paper"),
        ({"crossover": 1}, "crossover must be True or False, got 1"),
        ({"config_file": "/no/such.json"}, "cannot read settings.file /no/such.json: No such file"),
        ({"config_file": 3}, "config_file must be a path, got 3"),
        ({"block_size": 48.0}, "block_size must be an int from 16 to 128"),
        (["default"], "must be an object, got list"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse(given)


def test_a_wrong_config_file_is_refused(tmp_path):
    file = tmp_path / "tuned.json"
    for text, message in (("[1]", "must be a JSON object, got list"), ('{"stridd": 4}', "unknown setting stridd")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse({"config_file": str(file)})


PLAIN = {
    "attn_type": "decoder",
    "sliding_window": None,
    "alibi_slopes": None,
    "kv_cache_dtype": "auto",
    "readable": ("auto", "bfloat16", "fp8"),
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"kv_cache_dtype": "bfloat16"}, None),
        ({"kv_cache_dtype": "fp8"}, None),
        ({"attn_type": "encoder_only"}, "encoder only attention"),
        ({"attn_type": "encoder_decoder"}, "encoder decoder attention"),
        ({"sliding_window": 128}, "sliding window"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "fp8_e4m3 KV cache"),
    ],
)
def test_layers_that_stay_dense(change, reason):
    assert why_dense(**{**PLAIN, **change}) == reason


def test_layers_are_told_by_name():
    assert layer_index("model.layers.3.self_attn.attn") == 3
    assert layer_index("model.attn") is None
    second = "model.layers.1.self_attn.attn"
    tuned = Settings(StemConfig(), PrefillPolicy(layer_budgets=(1.0, 0.5)), "default")
    assert layer_config(second, tuned, 2) == StemConfig(budget_scale=0.5)
    assert layer_config("model.attn", parse({}), 2) == StemConfig()
    with pytest.raises(ValueError, match=r"layer_budgets: model\.attn does not say which"):
        layer_config("model.attn", tuned, 2)
    assert layer_config(second, parse({"preset": "official"}), 3) is None  # its first two layers are dense
    assert layer_config(second, parse({"dense_layers": [-1]}), 3) is not None


def test_the_table_of_the_layers():
    kinds = {0: ("dense", "dense layer"), 4: ("dense", "sliding window"), 6: ("dense", "sliding window")}
    rows = [(f"model.layers.{i}.self_attn.attn", *kinds.get(i, ("sparse", ""))) for i in (0, 1, 2, 3, 4, 5, 6, 8)]
    assert (
        table([*rows, ("encoder.attn", "not Stem's", "FlashAttentionImpl")])
        == """\
layers        attention   why
0             dense       dense layer
1-3, 5, 8     sparse
4, 6          dense       sliding window
encoder.attn  not Stem's  FlashAttentionImpl"""
    )


@pytest.mark.parametrize(
    ("spans", "runs"),
    [
        ([], []),
        ([(0, 0, 5, "paper"), (1, 5, 3, "paper")], [[0, 1]]),
        ([(1, 4, 5, "paper"), (2, 9, 3, "paper"), (4, 12, 3, "paper")], [[1, 2], [4]]),  # row 3 has no tokens
        ([(0, 0, 5, "paper"), (1, 6, 3, "paper")], [[0], [1]]),  # a decoded token of row 0 lies between
        ([(0, 0, 5, "paper"), (1, 5, 3, "official"), (2, 8, 2, "official")], [[0], [1, 2]]),
    ],
)
def test_runs(spans, runs):
    made = runs_of([Span(*place, 100, 200, parse({"preset": preset})) for *place, preset in spans])
    assert [[span.row for span in run.spans] for run in made] == runs
    for run in made:
        first, last = run.spans[0], run.spans[-1]
        assert (run.rows, run.tokens) == (
            slice(first.row, last.row + 1),
            slice(first.q_start, last.q_start + last.q_len),
        )
        assert [b - a for a, b in pairwise(run.cu_seqlens_q)] == [span.q_len for span in run.spans]
        assert (run.seq_lens, run.prompt_lens) == ([100] * len(run.spans), [200] * len(run.spans))
        assert run.settings == first.settings
