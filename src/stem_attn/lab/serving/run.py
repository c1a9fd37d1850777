"""Time prompts in vLLM, its own attention backend against Stem, in two engines on the same devices."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stem_attn.integrations.vllm.settings import CHOOSER, DENSE, KEY
from stem_attn.lab.errors import InputError
from stem_attn.lab.models import load_tokenizer
from stem_attn.lab.prompts import public_text
from stem_attn.lab.results import Record
from stem_attn.lab.serving.engines import WORKER, Engine, running_engines
from stem_attn.lab.shapes import MODELS

SIDES = ("dense", "stem", "by-request")
"""What is timed: vLLM's own backend, Stem's, and Stem's where each request asks for dense attention."""
EXECUTION: dict[str, Record] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}


def compare_engines(
    settings: Record, prompts: Sequence[list[int]], chunk: int, on_record: Callable[[Record], None]
) -> None:
    """Time prompts in chunks of one size. The sides take turns: every round times one prompt in each.

    Where their engines run one after the other (`in_turn`), each answers all prompts before the next one starts.

    Args:
        settings: What the command was asked for; see `command.serving`.
        prompts: Tokens.
        chunk: vLLM's `max_num_batched_tokens`.
        on_record: Given a record for each prompt.
    """
    times: list[dict[str, _Times]] = [{} for _ in prompts]
    with tempfile.TemporaryDirectory() as folder:
        options = _options(settings, chunk, max(map(len, prompts)) + settings["max_tokens"], Path(folder))
        for together in [[name] for name in options] if settings["in_turn"] else [list(options)]:
            chosen = {name: options[name] for name in together}
            with running_engines(chosen, at_once=settings["cache"] is not None) as engines:
                sides = {
                    side: _Side(engines[_engine(side)], side) for side in settings["sides"] if _engine(side) in engines
                }
                for ids, found in zip(prompts, times, strict=True):
                    found.update(_time(sides, ids, settings))
                    if len(found) == len(settings["sides"]):
                        on_record(_record(chunk, len(ids), {side: found[side] for side in settings["sides"]}))


def _engine(side: str) -> str:
    """Name the engine that a side's prompts go to."""
    return "dense" if side == "dense" else "stem"


@dataclass(frozen=True, slots=True)
class _Side:
    """Who answers, and what is asked for beside the prompt."""

    engine: Engine
    name: str

    def answer(self, ids: list[int], tokens: int) -> Record:
        return self.engine.answer(ids, tokens, {KEY: DENSE} if self.name == "by-request" else {})


@dataclass(frozen=True, slots=True)
class _Times:
    """What one side took for a prompt.

    Args:
        warm_up_seconds: Time to the first token of the prompt before it.
        runs: One a round.
    """

    warm_up_seconds: float
    runs: list[Record]


def _time(sides: Mapping[str, _Side], ids: list[int], settings: Record) -> dict[str, _Times]:
    """Ask the sides in turn, a warm-up first."""
    tokens, warm = settings["max_tokens"], settings["warm"]
    before = (ids[-warm:] if warm else ids)[::-1]
    times = {name: _Times(side.answer(before, tokens)["first_token_seconds"], []) for name, side in sides.items()}
    for _ in range(settings["rounds"]):
        for name, side in sides.items():
            times[name].runs.append(side.answer(ids, tokens))
    return times


def _record(chunk: int, length: int, times: Mapping[str, _Times]) -> Record:
    record: Record = {
        "chunk": chunk,
        "length": length,
        "warm_up_seconds": {name: found.warm_up_seconds for name, found in times.items()},
        "runs": {name: found.runs for name, found in times.items()},
    }
    for field in ("first_token_seconds", "next_token_seconds"):
        record[field] = {name: _median(found.runs, field) for name, found in times.items()}
    return record


def text_prompt(model: str, length: int) -> list[int]:
    """Return the first tokens of public text.

    Raises:
        InputError: The text has fewer, or the model has no tokenizer.
    """
    ids: list[int] = load_tokenizer(model)(public_text()[0][: 10 * length]).input_ids[:length]
    if len(ids) < length:
        raise InputError(f"the text has {len(ids)} tokens, --lengths asks for {length}")
    return ids


def random_prompt(shape: str, length: int) -> list[int]:
    """Return random tokens for a model of a named shape."""
    made: list[int] = torch.randint(MODELS[shape]["vocab_size"], (length,), generator=torch.manual_seed(0)).tolist()
    return made


def _options(settings: Record, chunk: int, positions: int, folder: Path) -> dict[str, Record]:
    """Return vLLM's options of the engines that are wanted; a model of random weights is written to the folder."""
    if settings["shape"] is None:
        model: Record = {"model": settings["model"]}
    else:
        model = _random_model(settings["shape"], positions, folder)
    shared = {
        **model,
        **EXECUTION[settings["execution"]],
        "dtype": settings["dtype"],
        "tensor_parallel_size": settings["tensor_parallel_size"],
        "enable_prefix_caching": False,
        "gpu_memory_utilization": settings["memory"],
        "max_model_len": positions,
        "max_num_seqs": 4,
        "max_num_batched_tokens": chunk,
        "disable_log_stats": False,  # the engine's own clock times the tokens
    }
    if settings["cache"] is not None:
        shared["kv_cache_memory_bytes"] = int(settings["cache"] * 2**30)
    selected = {
        "attention_backend": settings["backend"],
        "additional_config": {"stem": settings["stem"]},
        "worker_extension_cls": WORKER,
    }
    if "by-request" in settings["sides"]:
        selected["logits_processors"] = [CHOOSER]
    engines = {_engine(side) for side in settings["sides"]}
    return {name: one for name, one in {"dense": shared, "stem": {**shared, **selected}}.items() if name in engines}


def _random_model(shape: str, positions: int, folder: Path) -> Record:
    """Write the config of a model, and return the options with which vLLM gives it random weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODELS[shape]["model_type"]]]
    config = AutoConfig.for_model(**MODELS[shape], architectures=names, max_position_embeddings=positions)
    config.save_pretrained(folder)
    return {"model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True}


def _median(runs: Sequence[Record], field: str) -> float | None:
    """Return the median of a time, None where it was not taken."""
    return None if runs[0][field] is None else statistics.median(run[field] for run in runs)
