"""Servers that are asked for more than tokens, or lose a process: the same outcome as with the dense backend."""

import contextlib
import http.client
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from engines import KEEP_ALL, SPARSE
from servers import server
from tiny_families import prompt, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stem_attn.integrations.vllm.settings import CHOOSER

pytestmark = pytest.mark.slow

PROMPTS = [prompt(n, seed) for seed, n in enumerate((900, 700, 33))]
OPTIONS = {"max_model_len": 2048, "max_num_batched_tokens": 320, "enforce_eager": True, "served_model_name": "tiny"}


def complete(running, ids, status=200, **asked):
    body = {"model": "tiny", "prompt": ids, "temperature": 0, **asked}
    return json.loads(running.request("/v1/completions", body, status=status))


def bytes_for_words(folder):
    """Give a tiny model a tokenizer of bytes, and return them: vLLM's grammars need one that decodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
    return alphabet


def test_structured_output_is_what_the_dense_backend_gives(tmp_path):
    model = save("llama", tmp_path)
    letters = bytes_for_words(model)
    asked = {
        "structured_outputs": {"regex": "[a-m]{20}"},
        "max_tokens": 8,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with server(model, tmp_path / "log.txt", KEEP_ALL, logits_processors=CHOOSER, **OPTIONS) as running:
        found = []
        for choice in ({}, {"vllm_xargs": {"stem": "dense"}, "cache_salt": "stem=dense"}):
            with ThreadPoolExecutor(3) as clients:
                answers = list(clients.map(lambda ids, more=choice: complete(running, ids, **asked, **more), PROMPTS))
            found.append([answer["choices"][0]["token_ids"] for answer in answers])
            assert all(re.fullmatch("[a-m]{8}", "".join(letters[token] for token in ids)) for ids in found[-1])
        (counts,) = running.stats()
    assert found[0] == found[1]
    assert counts["sparse_tokens"] == counts["dense_tokens"]["asked for"] == 2 * sum(map(len, PROMPTS))


@pytest.mark.parametrize("stem", [None, SPARSE], ids=["dense", "sparse"])
def test_a_killed_worker_ends_the_server_and_nobody_waits(folders, tmp_path, stem):
    log = tmp_path / "log.txt"
    with server(folders("llama"), log, stem, tensor_parallel_size=2, **OPTIONS) as running:
        complete(running, PROMPTS[2], max_tokens=1)
        with ThreadPoolExecutor(1) as client:
            waiting = client.submit(complete, running, PROMPTS[0], status=500, max_tokens=1000, ignore_eos=True)
            children = psutil.Process(running.process.pid).children(recursive=True)
            worker = next(p for p in children if "Worker" in p.name() or "Worker" in " ".join(p.cmdline()))
            os.kill(worker.pid, signal.SIGKILL)
            with contextlib.suppress(OSError, http.client.HTTPException):  # gone before it could say so
                assert "EngineCore" in waiting.result(60)["error"]["message"]
        running.process.wait(60)
        assert psutil.wait_procs(children, timeout=30)[1] == []
    assert "died unexpectedly" in log.read_text()
