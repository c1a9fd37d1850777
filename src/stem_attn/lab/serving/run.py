"""Time prompts in vLLM, its own attention backend against Stem, in two engines that stand side by side.

    export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=2 VLLM_CPU_KVCACHE_SPACE=2
    python benchmarks/vllm_prefill.py --model FOLDER --lengths 8191 --chunks 8192,2048 --out vllm-cpu-prefill

    python benchmarks/vllm_prefill.py --shape llama3-8b --lengths 32768,131072 --chunks 8192 --dtype bfloat16 \
        --execution graphs --backend CUSTOM --max-tokens 33 --memory 0.46 --warm 0 --out vllm-h100-prefill

Each engine is in a process of its own. They take turns: every round times one prompt in each, until its first token,
and the tokens after it. The prompts are public text, or with `--shape` random tokens for a model of random weights.
The prefix cache is off.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem_attn.integrations.vllm.compat import VLLM_VERSION
from stem_attn.lab import machine
from stem_attn.lab.bench.ttft import MODELS
from stem_attn.lab.prompts import public_text

WORKER = "stem_attn.integrations.vllm.worker.StemWorkerExtension"
EXECUTION: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}
_engines: list[Any] = []  # in an engine's process: the engine


def start(options: dict[str, Any]) -> None:
    """Start this process's engine."""
    from vllm import LLM

    _engines.append(LLM(**options))


def stop() -> None:
    """Stop this process's engine, whose own processes would keep this one from ending."""
    _engines.pop().llm_engine.engine_core.shutdown()


def answer(ids: list[int], tokens: int, counted: bool) -> dict[str, Any]:
    """Have this process's engine answer a prompt greedily; tell how long it took, and what Stem did if it counts."""
    from vllm import SamplingParams

    (llm,) = _engines
    if counted:
        llm.collective_rpc("stem_reset_stats")
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    times = out.metrics
    return {
        "first_token_seconds": times.first_token_latency,
        "next_token_seconds": (times.last_token_ts - times.first_token_ts) / (tokens - 1) if tokens > 1 else None,
        "stats": llm.collective_rpc("stem_stats")[0] if counted else None,
    }


def random_model(shape: str, positions: int, folder: Path) -> dict[str, Any]:
    """Write the config of a model, and return the options with which vLLM gives it random weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODELS[shape]["model_type"]]]
    config = AutoConfig.for_model(**MODELS[shape], architectures=names, max_position_embeddings=positions)
    config.save_pretrained(folder)
    return {"model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True}


def text_prompt(model: str, length: int) -> list[int]:
    """Return the first tokens of public text."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model)(public_text()[0][: 10 * length]).input_ids[:length]
    if len(ids) < length:
        raise typer.BadParameter(f"the text has {len(ids)} tokens, --lengths asks for {length}")
    return ids


def random_prompt(shape: str, length: int) -> list[int]:
    """Return random tokens."""
    made: list[int] = torch.randint(MODELS[shape]["vocab_size"], (length,), generator=torch.manual_seed(0)).tolist()
    return made


def median(runs: list[dict[str, Any]], field: str) -> float | None:
    """Return the median of a time, None where it was not taken."""
    return None if runs[0][field] is None else statistics.median(run[field] for run in runs)


def main(
    model: Annotated[str | None, typer.Option(help="A name or a folder that vLLM loads.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead of a model: {', '.join(MODELS)}.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "8191",
    chunks: Annotated[str, typer.Option(help="max_num_batched_tokens, separated by commas.")] = "8192,2048",
    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "float32",
    execution: Annotated[
        str, typer.Option(help="eager, graphs (CUDA graphs of decodes), or compiled (vLLM's default).")
    ] = "eager",
    backend: Annotated[str, typer.Option(help="The plugin's backend: STEM, or CUSTOM where vLLM lacks it.")] = "STEM",
    stem: Annotated[str, typer.Option(help="The plugin's config, JSON.")] = "{}",
    max_tokens: Annotated[int, typer.Option(help="Tokens of the answers; from 2 on the later ones are timed.")] = 1,
    warm: Annotated[int, typer.Option(help="Tokens of the warm-up before each length; 0: as many.")] = 512,
    rounds: Annotated[int, typer.Option(help="Every backend runs once a round.")] = 3,
    memory: Annotated[float, typer.Option(help="Share of the memory for each of the two engines.")] = 0.3,
    out: Annotated[Path, typer.Option(help="Folder for vllm_prefill.json.")] = Path("vllm-prefill"),
) -> None:
    """Print a line for each chunk and prompt length, and write every number."""
    if (model is None) == (shape is None):
        raise typer.BadParameter("give --model or --shape")
    sizes = [int(length) for length in lengths.split(",")]
    positions = max(sizes) + max_tokens
    prompts = [text_prompt(model, n) if model else random_prompt(str(shape), n) for n in sizes]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **({"model": model} if model else random_model(str(shape), positions, Path(folder))),
            **EXECUTION[execution],
            "dtype": dtype,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": memory,
            "max_model_len": positions,
            "max_num_seqs": 4,
            "disable_log_stats": False,  # the engine's own clock times the tokens
        }
        selected = {
            "attention_backend": backend,
            "additional_config": {"stem": json.loads(stem)},
            "worker_extension_cls": WORKER,
        }
        for chunk in map(int, chunks.split(",")):
            with ExitStack() as stack:
                engines = {}
                for name, extra in (("dense", {}), ("stem", selected)):
                    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
                    engines[name] = stack.enter_context(pool)
                    pool.submit(start, {**options, "max_num_batched_tokens": chunk, **extra}).result()
                    stack.callback(lambda pool=pool: pool.submit(stop).result())
                for ids in prompts:
                    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
                    for pool in engines.values():
                        warm_up = ids[-warm:] if warm else ids
                        pool.submit(answer, warm_up[::-1], max_tokens, False).result()
                    for _ in range(rounds):
                        for name, pool in engines.items():
                            runs[name].append(pool.submit(answer, ids, max_tokens, name == "stem").result())
                    record = {"chunk": chunk, "length": len(ids), "runs": runs}
                    for field in ("first_token_seconds", "next_token_seconds"):
                        record[field] = {name: median(made, field) for name, made in runs.items()}
                    records.append(record)
                    typer.echo(describe(record))
    out.mkdir(parents=True, exist_ok=True)
    arguments = {
        "vllm": VLLM_VERSION,
        "model": model and Path(model).name,
        "shape": shape,
        "dtype": dtype,
        "execution": execution,
        "backend": backend,
    }
    report = {
        "machine": machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "arguments": {
            **arguments,
            "stem": json.loads(stem),
            "max_tokens": max_tokens,
            "warm": warm,
            "rounds": rounds,
            "memory": memory,
        },
        "records": records,
    }
    (out / "vllm_prefill.json").write_text(json.dumps(report, indent=1) + "\n")


def describe(record: dict[str, Any]) -> str:
    """Return a line on one chunk and prompt length."""
    first, later = record["first_token_seconds"], record["next_token_seconds"]
    line = (
        f"{record['length']} tokens in chunks of {record['chunk']}: first token dense {first['dense']:.3f} s, Stem"
        f" {first['stem']:.3f} s, ratio {first['dense'] / first['stem']:.2f}"
    )
    if later["dense"] is not None:
        line += f"; each token after it {1000 * later['dense']:.2f} and {1000 * later['stem']:.2f} ms"
    return f"{line}; {record['runs']['stem'][0]['stats']}"


if __name__ == "__main__":
    typer.run(main)
