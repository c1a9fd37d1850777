"""Prefill and decode apart: one server with Stem reads prompts, another one with dense attention answers them.

Pages go from one to the other through a folder, by the connector that vLLM ships as its example.
"""

import json
import shutil

import pytest
import torch
from engines import BLOCK, SPARSE
from servers import server, together
from tiny_families import prompt, save

from stem_attn.integrations.vllm.settings import CHOOSER

pytestmark = pytest.mark.slow

GPU = torch.cuda.is_available()
NEW_TOKENS = 8
NEAR = 0.25  # nats; what bfloat16 may turn round
PROMPTS = [prompt(n, seed) for seed, n in enumerate((1502, 700, 1033))]  # no whole number of pages
EVERYTHING = 1000  # times the budget
# Whole pages go over, and what lies behind the last one is read again, densely. Here that is part of the last query
# block, which Stem's settings keep whole: so both servers' answers must be the same.
PAGE = 32
OPTIONS = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "block_size": PAGE, "served_model_name": "tiny"}
# The example keeps whole prompts that one step reads, by their tokens alone.
OPTIONS |= {"no_enable_prefix_caching": True}
OPTIONS |= (
    {"dtype": "bfloat16", "gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**30}
    if GPU
    else {"enforce_eager": True}
)
DENSE = {"attention_backend": "FLASH_ATTN"} if GPU else {}


def connector(role, folder):
    extra = {"shared_storage_path": str(folder)}
    given = {"kv_connector": "ExampleConnector", "kv_role": role, "kv_connector_extra_config": extra}
    return {"kv_transfer_config": json.dumps(given)}


def complete(running, ids, tokens, **asked):
    """Greedy tokens, and the log-probabilities of the likeliest at every place."""
    body = {"model": "tiny", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 5}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    (got,) = json.loads(running.request("/v1/completions", {**body, **asked}))["choices"]
    return got["token_ids"], got["logprobs"]["top_logprobs"]


def assert_same(got, expected, likely):
    """The same tokens; on a GPU up to one that was about as likely."""
    place = next((n for n, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), None)
    if place is not None:
        assert GPU
        row = likely[place]
        assert row[f"token_id:{expected[place]}"] - row[f"token_id:{got[place]}"] < NEAR


def test_decode_answers_from_the_pages_that_sparse_prefill_made(tmp_path):
    assert BLOCK % PAGE == 0 < SPARSE["tail_blocks"]
    model = save("llama", tmp_path, **({"head_dim": 128} if GPU else {}))
    pages = tmp_path / "pages"
    pages.mkdir()
    prefill = {**OPTIONS, **connector("kv_producer", pages), "logits_processors": CHOOSER}
    decode = {**OPTIONS, **connector("kv_consumer", pages), **DENSE}
    with together(
        server(model, tmp_path / "prefill.txt", SPARSE, **prefill), server(model, tmp_path / "decode.txt", **decode)
    ) as (reader, writer):
        reader.reset_stats()
        for ids in PROMPTS:
            dense, likely = complete(writer, ids, NEW_TOKENS)
            found = {}
            for choice in ({}, {"vllm_xargs": {"stem": EVERYTHING}}):
                shutil.rmtree(pages)
                pages.mkdir()
                hits = decode_hits(tmp_path)
                whole, alone = complete(reader, ids, NEW_TOKENS, **choice)
                # The prefill server's first token goes along with the prompt: the example looks for what lies before.
                rest, _ = complete(writer, [*ids, whole[0]], NEW_TOKENS - 1)
                assert decode_hits(tmp_path) == hits + 1
                assert_same(rest, whole[1:], alone[1:])
                found[bool(choice)] = [whole[0], *rest]
            assert_same(found[True], dense, likely)
            assert found[False] != dense  # which shows whose pages they are
        (counts,) = reader.stats()
    assert counts["sparse_tokens"] == 2 * 2 * sum(map(len, PROMPTS))
    assert counts["unknown_prompt_len_tokens"] == 0


def decode_hits(folder):
    return (folder / "decode.txt").read_text().count("Inject KV cache of")
