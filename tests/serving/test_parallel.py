"""Tensor parallelism: two workers in processes of their own, which are spawned."""

import pytest
from engines import SPARSE, answer, engine
from tiny_families import prompt

pytestmark = pytest.mark.slow

# Heads that share a budget must live in one worker; those of a KV head always do.
BY_GROUP = {**SPARSE, "budget_scope": "group"}
PROMPTS = [prompt(n, seed) for seed, n in enumerate((700, 33, 512))]
PROMPT_TOKENS = sum(map(len, PROMPTS))


def test_two_workers_answer_as_one_and_count_apart(folders, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with engine(folders("llama"), BY_GROUP) as llm:
        one = answer(llm, PROMPTS)
        (alone,) = llm.collective_rpc("stem_stats")
    with engine(folders("llama"), {**BY_GROUP, "audit_rows": 64}, tensor_parallel_size=2) as llm:
        assert answer(llm, PROMPTS) == one
        for counts in llm.collective_rpc("stem_stats"):
            assert counts["sparse_tokens"] == PROMPT_TOKENS * 2
            assert counts["unknown_prompt_len_tokens"] == 0
            assert counts["density"] == alone["density"] < 0.7
            assert list(counts["audit"]) == [0, 1]
            assert all(found["recall"][0] < 1 for found in counts["audit"].values())  # each of its own heads
