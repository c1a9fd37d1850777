"""STEM against vLLM's own attention in real engines: a small Llama with random weights that make peaky attention.

    PYTHONPATH=tests/serving VLLM_ENABLE_V1_MULTIPROCESSING=0 python tests/serving/check_engine.py

On a GPU with and without CUDA graphs; `VLLM_USE_V2_MODEL_RUNNER=0` takes the V1 model runner. No test of pytest: it
takes four engines. Answers are compared token by token, layers with float32 attention and with `stem_attention` over
the queries, keys and values that they had. A line a check, and exit code 1 where one fails.
"""

import contextlib
import os
import sys
import tempfile
import traceback

import torch
import torch.nn.functional as F
from engines import (
    DECODE_GRAPHS,
    KEEP_ALL,
    SPARSE,
    engine,
    reconfigure,
    relative_error,
    sampling,
    set_chunk,
    stats,
    trace,
)

from stem_attn.policy import make_settings

LAYERS, VOCAB = 2, 4096
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
RTOL = 0.02 if GPU else 1e-3
DENSE_NAME = "FLASH_ATTN" if GPU else "CPU_ATTN"
OPTIONS = {"dtype": str(DTYPE).removeprefix("torch."), "gpu_memory_utilization": 0.2, "max_num_seqs": 8}
OPTIONS |= {"max_model_len": 8192, "max_num_batched_tokens": 8192}
if GPU:  # a cache of a size, so that no engine measures what other programs leave it
    OPTIONS |= {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**30}
BIG = SPARSE | {"min_seq_len": 1024}
failed = []


def check(name, ok, **found):
    if not ok:
        failed.append(name)
    print("PASS" if ok else "FAIL", name, found, flush=True)


@contextlib.contextmanager
def guarded(name):
    try:
        yield
    except Exception:
        check(name, False)
        traceback.print_exc()


def make_model(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=VOCAB,
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(DTYPE).save_pretrained(folder)


def ids(length, seed):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = ids(1029, 99)
MIXED = [ids(n, i) for i, n in enumerate((3000, 700, 33, 1500, 2101))]
CHUNKED = [ids(5003, 7)]
HIT = [PREFIX + ids(611, 8)]


def answers(llm, prompts, new=12):
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling(new, logprobs=3), use_tqdm=False)
    return [
        (list(o.outputs[0].token_ids), [{t: e.logprob for t, e in d.items()} for d in o.outputs[0].logprobs])
        for o in outs
    ]


def scenario(llm):
    """Every answer that is compared: one pass, chunks, prefix hit, mixed batch."""
    found = {}
    for name, prompts, chunk in (
        ("one pass", CHUNKED, 8192),
        ("chunks of 512", CHUNKED, 512),
        ("mixed, 512", MIXED, 512),
        ("mixed, 8192", MIXED, 8192),
    ):
        llm.reset_prefix_cache()
        set_chunk(llm, chunk)
        found[name] = answers(llm, prompts)
    llm.reset_prefix_cache()
    answers(llm, [PREFIX], 1)
    found["prefix hit"] = answers(llm, HIT)
    set_chunk(llm, 8192)
    return found


def compare(name, got, expected, tolerance):
    """Tokens equal up to near ties, and logprobs of the common tokens close."""
    worst, ties, differ, tokens = 0.0, 0, 0, 0
    for case in expected:
        for (a, la), (b, lb) in zip(got[case], expected[case], strict=True):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                both = la[i].keys() & lb[i].keys()
                worst = max([worst, *(abs(la[i][t] - lb[i][t]) for t in both)])
                tokens += 1
                if x != y:
                    top = sorted(lb[i].values())[-2:]
                    ties += abs(top[1] - top[0]) < tolerance
                    differ += abs(top[1] - top[0]) >= tolerance
                    break  # what follows answers another text
    check(name, differ == 0 and worst < tolerance, compared=tokens, near_ties=ties, differ=differ, worst_logprob=worst)


def exact(t, i):
    q, k, v = (x[i].float() for x in (t.q, t.k, t.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def layer_errors(t, attend=exact):
    """How far each layer's output is from that of a function of a trace and the layer's number."""
    return [relative_error(t.out[i].float(), attend(t, i).float()) for i in range(LAYERS)]


def traced_checks(llm):
    """What the layers gave, against float32 attention over the same queries, keys and values."""
    from stem_attn import stem_attention

    llm.reset_prefix_cache()
    for chunk in (8192, 512):
        set_chunk(llm, chunk)
        reconfigure(llm, KEEP_ALL)
        t = trace(llm, CHUNKED[0])
        errors, sparse = layer_errors(t), stats(llm)["sparse_tokens"]
        check(f"layers keep all, chunks {t.chunks[:3]}", max(errors) < RTOL, errors=errors, sparse=sparse)
    config, _ = make_settings(SPARSE)
    for chunk in (8192, 512):
        set_chunk(llm, chunk)
        reconfigure(llm, SPARSE)
        t = trace(llm, CHUNKED[0])
        counts = stats(llm)
        errors = layer_errors(t, lambda t, i: stem_attention(t.q[i], t.k[i], t.v[i], config=config))
        dense = layer_errors(t)
        finite = all(bool(o.isfinite().all()) for o in t.out)
        check(
            f"layers sparse, chunks {t.chunks[:3]}",
            finite
            and max(errors) < 2.5 * RTOL
            and counts["density"] < 0.6
            and counts["sparse_tokens"] == LAYERS * len(CHUNKED[0])
            and counts["unknown_prompt_len_tokens"] == 0,
            against_library=errors,
            against_dense=dense,
            counts=counts,
        )
    set_chunk(llm, 8192)


def live(llm, graphs):
    reconfigure(llm, BIG)
    found = scenario(llm)
    counts = stats(llm)
    finite = all(abs(p) < 1e3 for case in found.values() for _, d in case for row in d for p in row.values())
    check(
        f"sparse live, graphs={graphs}",
        finite
        and counts["sparse_tokens"] > 0
        and counts["density"] < 0.7
        and counts["dense_tokens"].get("short prompt", 0) > 0
        and counts["dense_tokens"].get("decode", 0) > 0
        and counts["unknown_prompt_len_tokens"] == 0,
        counts=counts,
    )
    return found


def main():
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        for graphs in (False, True) if GPU else (False,):
            options = OPTIONS | (DECODE_GRAPHS if graphs else {})
            with guarded(f"dense graphs={graphs}"), engine(folder, attention_backend=DENSE_NAME, **options) as llm:
                results["dense", graphs] = scenario(llm)
                if not graphs:
                    check("layers dense", max(layer_errors(trace(llm, ids(2000, 5)))) < RTOL)
            with guarded(f"stem graphs={graphs}"), engine(folder, KEEP_ALL, **options) as llm:
                results["stem", graphs] = scenario(llm)
                counts = stats(llm)
                ran = counts["sparse_tokens"] > 0 and counts["unknown_prompt_len_tokens"] == 0
                check(f"keep all ran sparse, graphs={graphs}", ran, counts=counts)
                if not graphs:
                    traced_checks(llm)
                results["live", graphs] = live(llm, graphs)
    tolerance = 0.15 if GPU else 0.01
    eager, captured = False, True
    pairs = [("stem", eager, "dense", eager), ("stem", captured, "dense", captured)]
    pairs += [("dense", captured, "dense", eager), ("live", captured, "live", eager)]
    for ours, our_graphs, theirs, their_graphs in pairs:
        a, b = (ours, our_graphs), (theirs, their_graphs)
        if a in results and b in results:
            compare(f"{a} = {b}", results[a], results[b], tolerance)
    print("FAILED:" if failed else "ALL PASSED", failed, flush=True)
    sys.stdout.flush()
    os._exit(bool(failed))  # vLLM's threads may hang at a usual exit


if __name__ == "__main__":
    main()
