"""Requests that go wrong, or are asked for more than tokens: the same outcome as with the dense backend."""

import math

import pytest
import torch
from engines import (
    DENSE,
    KEEP_ALL,
    SPARSE,
    answer,
    attention_layers,
    core,
    engine,
    reconfigure,
    runner,
    sampling,
    set_chunk,
    stats,
)
from tiny_families import VOCAB, prompt

LAYERS = 2
POISON = VOCAB - 2  # a token whose embedding is not a number
PROMPTS = [[t % (VOCAB - 2) for t in prompt(n, seed)] for seed, n in enumerate((900, 700, 33))]


@pytest.fixture(scope="module")
def llm(folders):
    with engine(folders("llama"), SPARSE, max_num_batched_tokens=2048, block_size=32, max_logprobs=3) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _fresh(llm):
    reconfigure(llm, SPARSE)
    set_chunk(llm, 320)


@pytest.fixture
def poisoned(llm):
    """The model with an embedding that makes activations NaN."""
    weight = runner(llm).model.model.embed_tokens.weight
    kept = weight[POISON].clone()
    with torch.no_grad():
        weight[POISON] = math.nan
        yield
        weight[POISON] = kept


def outcome(llm, prompts, **changed):
    """What an engine answers: of each request its texts' tokens, reasons to stop and log-probabilities, rounded."""
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling(**changed), use_tqdm=False)
    return [
        (
            [(list(one.token_ids), one.finish_reason) for one in out.outputs],
            [
                None if row is None else {token: pytest.approx(x.logprob, abs=1e-3) for token, x in row.items()}
                for row in out.prompt_logprobs or []
            ],
        )
        for out in outs
    ]


@pytest.mark.parametrize("stem", [SPARSE, KEEP_ALL, DENSE], ids=["sparse", "everything kept", "dense"])
def test_a_request_with_nan_activations_fails_alone(llm, poisoned, stem):
    reconfigure(llm, stem)
    alone = [tokens for ids in PROMPTS for tokens in answer(llm, [ids])]
    bad = [*PROMPTS[0][:300], POISON, *PROMPTS[0][301:]]
    llm.reset_prefix_cache()
    first, broken, *others = answer(llm, [PROMPTS[0], bad, *PROMPTS[1:]])
    assert [first, *others] == alone
    assert broken != alone[0]
    # Its pages are given to others, who do not see what is left in them.
    llm.reset_prefix_cache()
    assert answer(llm, PROMPTS) == alone


def test_an_aborted_prefill_leaves_the_others_alone(llm):
    set_chunk(llm, 4 * 2048)
    alone = [tokens for ids in PROMPTS[1:] for tokens in answer(llm, [ids])]
    set_chunk(llm, 320)
    llm.reset_prefix_cache()
    inner = llm.llm_engine
    for name, ids in zip("abc", PROMPTS, strict=True):
        inner.add_request(name, {"prompt_token_ids": ids}, sampling())
    inner.step()
    (first, *_) = core(llm).scheduler.running
    assert 0 < first.num_computed_tokens < len(PROMPTS[0])  # in its prompt
    inner.abort_request(["a"])
    done = {}
    while inner.has_unfinished_requests():
        done |= {out.request_id: list(out.outputs[0].token_ids) for out in inner.step() if out.finished}
    assert [done[name] for name in "bc"] == alone
    assert answer(llm, PROMPTS[1:]) == alone


@pytest.mark.parametrize(
    "changed", [{"prompt_logprobs": 2}, {"n": 3, "temperature": 1.0}], ids=["prompt log-probabilities", "n"]
)
def test_more_than_tokens_is_what_the_dense_backend_gives(llm, changed):
    found = []
    for stem in (DENSE, KEEP_ALL):
        reconfigure(llm, stem)
        torch.manual_seed(0)  # not a request's own seed: vLLM 0.32 stumbles over those in chunks on a CPU
        found.append(outcome(llm, PROMPTS, **changed))
        assert (stats(llm)["sparse_tokens"] > 0) == (stem is KEEP_ALL)
    dense, ours = found
    assert [len(texts) for texts, _ in ours] == [changed.get("n", 1)] * len(PROMPTS)
    assert ours == dense


def test_a_preempted_prefill_is_done_again(llm):
    (alone,) = answer(llm, PROMPTS[:1])
    llm.reset_prefix_cache()
    llm.collective_rpc("stem_reset_stats")
    scheduler = core(llm).scheduler
    schedule, steps = scheduler.schedule, []

    def once_preempted(*args, **kwargs):
        if len(steps) == 2:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        steps.append(1)
        return schedule(*args, **kwargs)

    scheduler.schedule = once_preempted
    try:
        assert answer(llm, PROMPTS[:1]) == [alone]
    finally:
        scheduler.schedule = schedule
    assert stats(llm)["sparse_tokens"] == (640 + 900) * LAYERS


def test_an_urgent_request_takes_the_pages_of_another_one_and_both_answer_as_ever(folders):
    # 40 pages of 32 tokens: both prompts fit, and not both answers.
    prompts = [ids[:600] for ids in PROMPTS[:2]]
    options = {"block_size": 32, "num_gpu_blocks_override": 40, "scheduling_policy": "priority"}
    wanted = sampling(100)
    found = []
    with engine(folders("llama"), DENSE, max_num_batched_tokens=320, max_model_len=1200, **options) as llm:
        inner = llm.llm_engine
        for stem in (DENSE, KEEP_ALL):
            reconfigure(llm, stem)
            inner.add_request("patient", {"prompt_token_ids": prompts[0]}, wanted, priority=5)
            done = {out.request_id: out for _ in range(2) for out in inner.step()}  # in its prompt
            inner.add_request("urgent", {"prompt_token_ids": prompts[1]}, wanted, priority=0)
            order = []
            while inner.has_unfinished_requests():
                finished = [out for out in inner.step() if out.finished]
                done |= {out.request_id: out for out in finished}
                order += [out.request_id for out in finished]
            assert order == ["urgent", "patient"]
            counts = stats(llm)
            # Of one prompt some tokens were read twice: those whose pages the other one took.
            assert (counts["sparse_tokens"] > 2 * 600 * LAYERS) == (stem is KEEP_ALL)
            found.append({name: list(out.outputs[0].token_ids) for name, out in done.items()})
            assert inner.reset_prefix_cache()
    assert found[0] == found[1]


def test_decode_context_parallelism_is_refused_by_name(llm, monkeypatch):
    from vllm.config import set_current_vllm_config

    from stem_attn.integrations.vllm.cpu import StemCpuImpl

    config = runner(llm).vllm_config
    monkeypatch.setattr(config.parallel_config, "decode_context_parallel_size", 2)
    with set_current_vllm_config(config), pytest.raises(ValueError, match=r"--decode-context-parallel-size 2 spreads"):
        StemCpuImpl(4, 32, 1.0, 2)
    assert attention_layers(llm)
