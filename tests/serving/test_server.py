"""A server of a real model, SmolLM2, with Stem: asked about a long text, streamed from, measured and stopped."""

import json
import os

import pytest
from servers import server

pytestmark = pytest.mark.slow

STEM = {"block_size": 64, "budget_bias": 8, "min_seq_len": 1024, "crossover": False}
LAYERS = 30


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "metrics").mkdir()
    options = {"max_model_len": 4096, "max_num_batched_tokens": 512, "enforce_eager": True, "dtype": "float32"}
    model = os.environ["STEM_TEST_MODEL"]  # `make test-vllm` converts it
    with server(model, folder / "log.txt", STEM, folder / "metrics", served_model_name="smollm2", **options) as running:
        yield running


@pytest.fixture(scope="module")
def needle_and_text():
    from stem_attn.lab.prompts import make_needle, public_text

    text, _ = public_text()
    text = text[:12_000]  # about 3000 tokens
    needle = make_needle(text, seed=0)
    gap = text.find("\n\n", int(needle.depth * len(text)))
    return needle, f"{text[:gap]}\n\n{needle.sentence}{text[gap:]}"


def test_the_startup_line(running):
    lines = [line for line in running.log.read_text().splitlines() if "stem-attn" in line]
    assert any("on vLLM 0.32" in line and "preset default with block_size=64" in line for line in lines), lines


def test_a_question_about_a_long_text_is_answered_from_sparse_prefill(running, needle_and_text):
    needle, text = needle_and_text
    running.request("/collective_rpc", {"method": "stem_reset_stats"})
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": f"{text}\n\n{needle.question}"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = json.loads(running.request("/v1/chat/completions", body))
    prompt_tokens = answer["usage"]["prompt_tokens"]
    assert prompt_tokens > 2500
    assert needle.answer in answer["choices"][0]["message"]["content"]
    (counts,) = running.stats()
    assert counts["sparse_tokens"] == prompt_tokens * LAYERS
    assert counts["unknown_prompt_len_tokens"] == 0
    assert counts["density"] < 0.6


def test_a_streamed_answer_is_the_whole_one(running, needle_and_text):
    _, text = needle_and_text
    body = {"model": "smollm2", "prompt": text[:6000], "temperature": 0, "max_tokens": 12}
    whole = json.loads(running.request("/v1/completions", body))["choices"][0]["text"]
    events = running.request("/v1/completions", {**body, "stream": True}).split("\n\n")
    parts = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert len(parts) > 3
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    assert "data: [DONE]" in events


def test_the_counters_stand_on_the_metrics_page(running):
    page = running.request("/metrics")
    values = {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in page.splitlines() if line.startswith("stem_"))
    }
    assert values['stem_tokens_total{attention="sparse",reason=""}'] > 0
    assert values['stem_tokens_total{attention="dense",reason="decode"}'] > 0
    assert 0 < values["stem_kept_blocks_total"] < values["stem_causal_blocks_total"]
    assert values["stem_selection_seconds_total"] > 0
    assert "vllm:prompt_tokens_total" in page  # vLLM's own are still there
