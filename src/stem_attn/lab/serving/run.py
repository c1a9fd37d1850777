"""Time prompts in vLLM, its own attention backend against Stem, in two engines that stand side by side."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from stem_attn.lab.errors import InputError
from stem_attn.lab.prompts import public_text
from stem_attn.lab.results import Record
from stem_attn.lab.serving.engines import WORKER, Engine, running_engine
from stem_attn.lab.shapes import MODELS

EXECUTION: dict[str, Record] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}


def compare_engines(
    settings: Record, prompts: Sequence[list[int]], chunk: int, on_record: Callable[[Record], None]
) -> None:
    """Time prompts in chunks of one size. The engines take turns: every round times one prompt in each.

    Args:
        settings: What the command was asked for; see `command.serving`.
        prompts: Tokens.
        chunk: vLLM's `max_num_batched_tokens`.
        on_record: Given a record for each prompt.
    """
    tokens, warm = settings["max_tokens"], settings["warm"]
    with _engines(settings, chunk, max(map(len, prompts)) + tokens) as engines:
        for ids in prompts:
            first = {
                name: engine.answer((ids[-warm:] if warm else ids)[::-1], tokens)["first_token_seconds"]
                for name, engine in engines.items()
            }
            runs: dict[str, list[Record]] = {name: [] for name in engines}
            for _ in range(settings["rounds"]):
                for name, engine in engines.items():
                    runs[name].append(engine.answer(ids, tokens))
            record: Record = {"chunk": chunk, "length": len(ids), "warm_up_seconds": first, "runs": runs}
            for field in ("first_token_seconds", "next_token_seconds"):
                record[field] = {name: _median(made, field) for name, made in runs.items()}
            on_record(record)


def text_prompt(model: str, length: int) -> list[int]:
    """Return the first tokens of public text.

    Raises:
        InputError: The text has fewer.
    """
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model)(public_text()[0][: 10 * length]).input_ids[:length]
    if len(ids) < length:
        raise InputError(f"the text has {len(ids)} tokens, --lengths asks for {length}")
    return ids


def random_prompt(shape: str, length: int) -> list[int]:
    """Return random tokens for a model of a named shape."""
    made: list[int] = torch.randint(MODELS[shape]["vocab_size"], (length,), generator=torch.manual_seed(0)).tolist()
    return made


@contextmanager
def _engines(settings: Record, chunk: int, positions: int) -> Iterator[Mapping[str, Engine]]:
    """Start the dense engine and Stem's."""
    with ExitStack() as stack:
        if settings["shape"] is None:
            model: Record = {"model": settings["model"]}
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model = _random_model(settings["shape"], positions, Path(folder))
        shared = {
            **model,
            **EXECUTION[settings["execution"]],
            "dtype": settings["dtype"],
            "enable_prefix_caching": False,
            "gpu_memory_utilization": settings["memory"],
            "max_model_len": positions,
            "max_num_seqs": 4,
            "max_num_batched_tokens": chunk,
            "disable_log_stats": False,  # the engine's own clock times the tokens
        }
        selected = {
            "attention_backend": settings["backend"],
            "additional_config": {"stem": settings["stem"]},
            "worker_extension_cls": WORKER,
        }
        yield {
            "dense": stack.enter_context(running_engine(shared, counted=False)),
            "stem": stack.enter_context(running_engine({**shared, **selected}, counted=True)),
        }


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
