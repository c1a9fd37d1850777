"""Engines in this process, and what their layers computed."""

import contextlib
import gc
from dataclasses import dataclass

import torch

from stem_attn.integrations.vllm.settings import parse
from stem_attn.policy import make_settings

# Blocks of 64 tokens, so that pages of 32 or 128 end inside blocks and blocks inside pages.
BLOCK = 64
SPARSE = {
    "block_size": BLOCK,
    "stride": 8,
    "min_seq_len": 0,
    "budget_ratio": 0.15,
    "budget_bias": 1,
    "tail_blocks": 1,
    "crossover": False,
    "depth_decay": 1.0,  # all layers alike, so that what they do can be compared
}
KEEP_ALL = {**SPARSE, "budget_ratio": 1.0, "decay": 1.0}
DENSE = {**SPARSE, "min_seq_len": 10**9}
# CUDA graphs of decodes, without compiling the model.
DECODE_GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
NEAR = 0.25  # nats; what bfloat16 may turn round
EXTENSION = "stem_attn.integrations.vllm.worker.StemWorkerExtension"


@contextlib.contextmanager
def engine(folder, stem=None, **options):
    """An engine; with `stem`, the plugin's config, on the plugin's backend."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from stem_attn.integrations.vllm.compat import names_backends

    if stem is not None:
        options.setdefault("attention_backend", "STEM" if names_backends() else "CUSTOM")
        options["additional_config"] = {"stem": stem}
        options["worker_extension_cls"] = EXTENSION
    usual = {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "skip_tokenizer_init": True,
    }
    llm = LLM(folder, **{**usual, **options})
    if stem is not None:
        llm.collective_rpc("stem_reset_stats")  # this process may have had other engines
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling(new_tokens=8, **changed):
    """Ask for so many of the likeliest tokens, whatever they are, and for no text."""
    from vllm import SamplingParams

    usual = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**usual, **changed})


def answer(llm, prompts, new_tokens=8, **changed):
    """Greedy answers to lists of tokens, all asked at once."""
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    outs = llm.generate(asked, sampling(new_tokens, **changed), use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


def differing(ours, theirs):
    """Count the answers that differ; where one first does, both tokens must have been about as likely."""
    count = 0
    for (got, _), (expected, likely) in zip(ours, theirs, strict=True):
        place = next((n for n, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            count += 1
            assert got[place] in likely[place]
            assert likely[place][expected[place]].logprob - likely[place][got[place]].logprob < NEAR
    return count


def stats(llm):
    """Counts of the one worker."""
    (counts,) = llm.collective_rpc("stem_stats")
    return counts


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def runner(llm):
    return core(llm).model_executor.driver_worker.worker.model_runner


def attention_layers(llm):
    """Attention layers by vLLM's names."""
    layers = runner(llm).compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if hasattr(layer, "impl")}  # not the experts


def builders(llm):
    return [b for groups in runner(llm).attn_groups for group in groups for b in group.metadata_builders]


def reconfigure(llm, stem):
    """Give a running engine another config: engines take long to start."""
    settings = parse(stem)
    for layer in attention_layers(llm).values():
        layer.impl.settings = settings
    for builder in builders(llm):
        builder._settings = settings
    llm.collective_rpc("stem_reset_stats")
    llm.reset_prefix_cache()


def set_chunk(llm, tokens):
    """Compute at most so many tokens a step."""
    core(llm).scheduler.max_num_scheduled_tokens = tokens


@dataclass
class Trace:
    """What the attention layers of a lone request got and gave, all its steps together."""

    q: list[torch.Tensor]  # one a layer, [1, Hq, T, D]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    out: list[torch.Tensor]
    chunks: list[int]


@contextlib.contextmanager
def traced(llm):
    """Record the attention layers while one request runs."""
    layers = list(attention_layers(llm).values())
    parts = [{"q": [], "k": [], "v": [], "out": []} for _ in layers]
    handles = []
    for layer, part in zip(layers, parts, strict=True):

        def record(module, args, kwargs, output, part=part):
            q, k, v = (*args, *kwargs.values())[:3]
            heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads, module.num_heads)
            for name, x, count in zip(part, (q, k, v, output), heads, strict=True):
                part[name].append(x.detach().clone().view(-1, count, module.head_size).transpose(0, 1))

        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    trace = Trace([], [], [], [], [])
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
    for name in ("q", "k", "v", "out"):
        getattr(trace, name).extend(torch.cat(part[name], 1)[None] for part in parts)
    trace.chunks.extend(x.shape[1] for x in parts[0]["q"])


def trace(llm, ids):
    """Trace the prefill of one prompt."""
    with traced(llm) as recorded:
        answer(llm, [ids], new_tokens=1)
    return recorded


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


def config_of(stem):
    return make_settings(stem)[0]
