"""Quality per request: what requests ask for under `stem`, mixed in one batch, behind prefixes of others, and wrong."""

import json

import pytest
from engines import SPARSE, answer, builders, core, engine, reconfigure, sampling, set_chunk, stats
from servers import server
from tiny_families import greedy, prompt

from stem_attn.integrations.vllm.settings import CHOOSER

LAYERS = 2
PROMPTS = [prompt(n, seed) for seed, n in enumerate((1502, 700, 33, 1025))]
CHOICES = [None, "dense", 3, 1.5]


def ask(llm, prompts, choices, salts="named", new_tokens=8):
    """Greedy answers to prompts, each with its own choice, all asked at once."""
    if salts == "named":
        salts = [None if asked is None else f"tenant stem={asked}" for asked in choices]
    wanted = [sampling(new_tokens, extra_args=None if asked is None else {"stem": asked}) for asked in choices]
    asked = [
        {"prompt_token_ids": ids, **({} if salt is None else {"cache_salt": salt})}
        for ids, salt in zip(prompts, salts, strict=True)
    ]
    return [list(out.outputs[0].token_ids) for out in llm.generate(asked, wanted, use_tqdm=False)]


@pytest.fixture(scope="module")
def llm(folders):
    options = {"max_num_batched_tokens": 2048, "block_size": 32, "logits_processors": [CHOOSER]}
    with engine(folders("llama"), SPARSE, **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _fresh(llm):
    reconfigure(llm, SPARSE)
    set_chunk(llm, 300)  # steps mix prompts of several requests with decodes


def test_a_dense_request_after_a_sparse_one_of_the_same_prefix_has_dense_tokens(llm, folders):
    prompts = PROMPTS[:1]
    (sparse,) = answer(llm, prompts)
    (dense,) = greedy(folders("llama"), prompts, 8)
    assert sparse != dense
    llm.collective_rpc("stem_reset_stats")
    assert ask(llm, prompts, ["dense"]) == [dense]
    assert stats(llm)["sparse_tokens"] == 0
    assert stats(llm)["dense_tokens"] == {"asked for": 1502 * LAYERS, "decode": 7 * LAYERS}
    # And its pages are found by the next dense request, not by others.
    llm.collective_rpc("stem_reset_stats")
    assert ask(llm, prompts, ["dense"]) == [dense]
    assert stats(llm)["dense_tokens"]["asked for"] == (1502 - 46 * 32) * LAYERS
    assert answer(llm, prompts) == [sparse]


def test_a_mixed_batch_answers_as_each_request_alone(llm):
    ask(llm, PROMPTS, CHOICES)
    counts = stats(llm)
    assert counts["dense_tokens"]["asked for"] == 700 * LAYERS
    assert counts["sparse_tokens"] == (1502 + 33 + 1025) * LAYERS
    assert counts["unknown_prompt_len_tokens"] == 0
    set_chunk(llm, 2048)
    alone = []
    for ids, asked in zip(PROMPTS, CHOICES, strict=True):
        llm.reset_prefix_cache()
        alone += ask(llm, [ids], [asked])
    set_chunk(llm, 4 * 2048)
    llm.reset_prefix_cache()
    assert ask(llm, PROMPTS, CHOICES) == alone


def test_a_factor_keeps_more_blocks(llm):
    density = {}
    for asked in (None, 2, 100):
        llm.collective_rpc("stem_reset_stats")
        ask(llm, PROMPTS[:1], [asked], new_tokens=1)
        density[asked] = stats(llm)["density"]
    assert density[None] < density[2] < density[100] == 1


def test_a_presets_dense_layers_are_its_requests_own(llm):
    # 40 blocks of 128: the official preset's first layers are dense, here all.
    long = prompt(3900, 5)
    ask(llm, [long, PROMPTS[1]], ["official", None], new_tokens=1)
    assert stats(llm)["dense_tokens"] == {"dense layer": len(long) * LAYERS}
    assert stats(llm)["sparse_tokens"] == 700 * LAYERS


@pytest.mark.parametrize(
    ("asked", "salt", "message"),
    [
        ("fast", "stem=fast", "must be 'dense', a preset"),
        (True, "stem=True", "must be 'dense', a preset"),
        ("dense", None, "\"dense\"} needs a cache_salt that ends in 'stem=dense', got None: prefix caching is on"),
        ("dense", "system=dense", "needs a cache_salt that ends in 'stem=dense', got 'system=dense'"),
        ("dense", "stem=2", "needs a cache_salt that ends in 'stem=dense', got 'stem=2'"),
        (None, "a stem=dense", "the cache_salt 'a stem=dense' is for requests with 'stem': 'dense', and this one has"),
    ],
)
def test_a_wrong_request_is_refused_and_the_engine_lives(llm, asked, salt, message):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        ask(llm, PROMPTS[2:3], [asked], [salt])
    assert len(answer(llm, PROMPTS[2:3])) == 1


def test_a_salt_whose_end_only_looks_like_a_choice_is_a_salt(llm):
    assert len(ask(llm, PROMPTS[2:3], [None], ["system=prod"])) == 1


def test_without_prefix_caching_no_salt_is_asked_for(llm, monkeypatch):
    config = llm.llm_engine.input_processor.vllm_config.cache_config
    monkeypatch.setattr(config, "enable_prefix_caching", False)
    assert len(ask(llm, PROMPTS[2:3], ["dense"], [None])) == 1


def test_a_preempted_request_keeps_its_choice(llm):
    (alone,) = ask(llm, PROMPTS[:1], ["dense"])
    llm.reset_prefix_cache()
    llm.collective_rpc("stem_reset_stats")
    scheduler = core(llm).scheduler
    schedule, steps = scheduler.schedule, []

    def once_preempted(*args, **kwargs):
        if len(steps) == 3:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        steps.append(1)
        return schedule(*args, **kwargs)

    scheduler.schedule = once_preempted
    try:
        assert ask(llm, PROMPTS[:1], ["dense"]) == [alone]
    finally:
        scheduler.schedule = schedule
    assert stats(llm)["sparse_tokens"] == 0
    assert stats(llm)["dense_tokens"]["asked for"] > 1502 * LAYERS


def test_where_requests_may_not_choose_they_have_the_servers_settings(llm, monkeypatch, caplog):
    (expected,) = answer(llm, PROMPTS[:1])
    for builder in builders(llm):
        monkeypatch.setattr(builder, "_per_request", False)
    assert ask(llm, PROMPTS[:1], ["dense"]) == [expected]
    (line,) = [line for line in caplog.messages if "is ignored" in line]
    assert f"--logits-processors {CHOOSER}" in line


def test_where_choices_cannot_be_read_prompts_are_dense_for_a_reason_of_its_own(llm, folders, monkeypatch, caplog):
    from stem_attn.integrations.vllm.compat import Told

    unknown = Told(None, known=False)
    for builder in builders(llm):  # as with two half batches at once
        monkeypatch.setattr(builder._requests, "of", lambda common: [unknown] * len(common.is_prefilling))
    assert ask(llm, PROMPTS[:2], [None, 3]) == greedy(folders("llama"), PROMPTS[:2], 8)
    counts = stats(llm)
    assert counts["sparse_tokens"] == 0
    assert counts["dense_tokens"]["choice unknown"] == (1502 + 700) * LAYERS
    assert "asked for" not in counts["dense_tokens"]
    assert any("what requests choose cannot be read here: their prompts are dense" in line for line in caplog.messages)


def test_over_http_a_wrong_choice_is_a_400_and_a_right_one_is_heard(folders, tmp_path):
    options = {"max_model_len": 4096, "enforce_eager": True, "served_model_name": "tiny", "logits_processors": CHOOSER}
    body = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 1, "temperature": 0}
    with server(folders("llama"), tmp_path / "log.txt", SPARSE, **options) as running:
        for wrong, message in (
            ({"vllm_xargs": {"stem": "fast"}, "cache_salt": "stem=fast"}, "must be 'dense', a preset"),
            ({"vllm_xargs": {"stem": 2}}, "needs a cache_salt that ends in 'stem=2', got None"),
            # Of a beam search's parameters vLLM keeps the salt alone.
            ({"vllm_xargs": {"stem": 2}, "cache_salt": "stem=2", "use_beam_search": True}, "and this one has none"),
        ):
            refused = json.loads(running.request("/v1/completions", {**body, **wrong}, status=400))
            assert message in refused["error"]["message"]
        for asked in ("dense", 2):
            right = {"vllm_xargs": {"stem": asked}, "cache_salt": f"stem={asked}"}
            running.request("/v1/completions", {**body, **right})
        (counts,) = running.stats()
    assert counts["dense_tokens"] == {"asked for": 700 * LAYERS}
    assert counts["sparse_tokens"] == 700 * LAYERS
