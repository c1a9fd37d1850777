"""Load: 64 clients at once, 500 requests of mixed lengths, chunked prefill and prefix hits among them."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import KEEP_ALL
from servers import server
from tiny_families import prompt

pytestmark = pytest.mark.slow

CLIENTS = 64
REQUESTS = 500
WARM = 200  # requests by which every page of the cache has been written once
# The cache is small, so that its memory is all in use early: 2048 pages of 32 tokens.
OPTIONS = {
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "num_gpu_blocks_override": 2048,
    "enforce_eager": True,
    "disable_log_stats": True,
    "served_model_name": "tiny",
}


def requests():
    """Each prompt twice or more, in random order, so that some find their pages cached."""
    rng = random.Random(0)
    prompts = [prompt(rng.randint(1, 1500), seed) for seed in range(REQUESTS // 2)]
    return [rng.choice(prompts) for _ in range(REQUESTS)]


def ask(running, asked):
    """Greedy answers, and the memory after the warm-up and at the end."""

    def one(ids):
        body = {"model": "tiny", "prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = json.loads(running.request("/v1/completions", {**body, "return_token_ids": True}))
        return answer["choices"][0]["token_ids"]

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(one, asked[:WARM]))
        warm = running.memory_mb()
        answers += clients.map(one, asked[WARM:])
    return answers, warm, running.memory_mb()


def test_none_lost_none_wrong_memory_steady(folders, tmp_path, record_property):
    asked = requests()
    with server(folders("llama"), tmp_path / "dense.txt", **OPTIONS) as running:
        expected, dense_warm, dense_end = ask(running, asked)
    with server(folders("llama"), tmp_path / "stem.txt", KEEP_ALL, **OPTIONS) as running:
        answers, warm, end = ask(running, asked)
        (counts,) = running.stats()
    record_property(
        "load",
        f"{REQUESTS} requests of {CLIENTS} clients; MB after {WARM} and {REQUESTS} requests: dense server"
        f" {dense_warm:.0f} and {dense_end:.0f}, STEM {warm:.0f} and {end:.0f}",
    )
    assert len(answers) == REQUESTS
    wrong = [i for i, (ours, dense) in enumerate(zip(answers, expected, strict=True)) if ours != dense]
    assert wrong == []
    assert counts["sparse_tokens"] > 2 * 100_000
    assert counts["unknown_prompt_len_tokens"] == 0
    assert end < warm + 30, f"dense: {dense_warm:.0f} and {dense_end:.0f} MB"
