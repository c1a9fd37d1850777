"""`stem-attn serving`: prompts in vLLM, its own attention backend against Stem."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import METHOD, MODEL, OUTPUT, PROMPT, whole_numbers
from stem_attn.lab.results import Record, check_folder, new_record, print_text, to_json, write_files
from stem_attn.lab.shapes import MODELS

_BACKENDS = ("STEM", "CUSTOM")


def serving(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where vllm_prefill.json goes.", rich_help_panel=OUTPUT)],
    model: Annotated[
        str | None, typer.Option(help="A name or a folder that vLLM loads.", rich_help_panel=MODEL)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead of a model: {', '.join(MODELS)}.", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="vLLM's: auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)
    ] = "float32",
    execution: Annotated[
        str,
        typer.Option(
            help="eager, graphs (CUDA graphs of decodes), or compiled (vLLM's default).", rich_help_panel=MODEL
        ),
    ] = "eager",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Devices that share every layer, for each engine.", rich_help_panel=MODEL)
    ] = 1,
    memory: Annotated[float, typer.Option(help="Share of the memory for each engine.", rich_help_panel=MODEL)] = 0.3,
    cache: Annotated[
        float | None,
        typer.Option(
            help="GiB of keys and values for each engine, instead of what its share of the memory leaves. Nothing has "
            "to be measured then, and the engines start at the same time.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    in_turn: Annotated[
        bool,
        typer.Option(
            "--in-turn",
            help="Stop the first engine before the second starts, where memory holds one only. Their prompts do not "
            "alternate then.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, separated by commas.", rich_help_panel=PROMPT)
    ] = "8191",
    chunks: Annotated[
        str, typer.Option(help="max_num_batched_tokens, separated by commas.", rich_help_panel=PROMPT)
    ] = "8192,2048",
    max_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of the answers; from 2 on the later ones are timed.", rich_help_panel=PROMPT),
    ] = 1,
    warm: Annotated[
        int,
        typer.Option(min=0, help="Tokens of the warm-up before each length; 0: as many.", rich_help_panel=PROMPT),
    ] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Every backend runs once a round.", rich_help_panel=PROMPT)] = 3,
    backend: Annotated[
        str, typer.Option(help="The plugin's backend: STEM, or CUSTOM where vLLM lacks it.", rich_help_panel=METHOD)
    ] = "STEM",
    stem: Annotated[str, typer.Option(help="The plugin's config, JSON.", rich_help_panel=METHOD)] = "{}",
    sides: Annotated[
        str,
        typer.Option(
            help="What is timed, separated by commas: dense (vLLM's own backend), stem, by-request (dense attention "
            "that requests ask Stem's engine for).",
            rich_help_panel=METHOD,
        ),
    ] = "dense,stem",
) -> None:
    """Time prompts in vLLM, its own attention backend against Stem, in engines on the same devices.

    Prompts are public text, or with --shape random tokens for a model of random weights. The prefix cache is off.
    A line for each chunk size and length; every number goes to the file.
    """
    from stem_attn.lab.devices import check_dtype, pick_device
    from stem_attn.lab.serving.report import line
    from stem_attn.lab.serving.run import EXECUTION, SIDES, compare_engines, random_prompt, text_prompt

    if (model is None) == (shape is None):
        raise InputError("give --model or --shape, one of them")
    if shape is not None and shape not in MODELS:
        raise InputError(f"--shape must be one of {', '.join(MODELS)}, got {shape!r}")
    if execution not in EXECUTION:
        raise InputError(f"--execution must be one of {', '.join(EXECUTION)}, got {execution!r}")
    check_dtype(dtype)
    if backend not in _BACKENDS:
        raise InputError(f"--backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if not 0 < memory <= 1:
        raise InputError(f"--memory takes a share above 0, at most 1, got {memory:g}")
    if cache is not None and not 0 < cache < math.inf:
        raise InputError(f"--cache takes GiB above 0, got {cache:g}")
    timed = sides.split(",")
    if not set(timed) <= set(SIDES) or len(set(timed)) < len(timed):
        raise InputError(f"--sides takes some of {', '.join(SIDES)}, each once, got {sides!r}")
    settings: Record = {
        "model": model,
        "shape": shape,
        "dtype": dtype,
        "execution": execution,
        "tensor_parallel_size": tensor_parallel_size,
        "memory": memory,
        "cache": cache,
        "in_turn": in_turn,
        "lengths": whole_numbers("--lengths", lengths),
        "chunks": whole_numbers("--chunks", chunks),
        "max_tokens": max_tokens,
        "warm": warm,
        "rounds": rounds,
        "backend": backend,
        "stem": _stem(stem),
        "sides": timed,
    }
    file = out / "vllm_prefill.json"
    check_folder(out, file)
    require("vllm", extra="vllm")
    from stem_attn.integrations.vllm.compat import VLLM_VERSION

    prompts = [text_prompt(model, n) if model else random_prompt(str(shape), n) for n in settings["lengths"]]
    told = {**settings, "model": model and Path(model).name}
    report: Record = {**new_record("serving", told, pick_device("auto")), "vllm": VLLM_VERSION, "records": []}

    def on_record(record: Record) -> None:
        report["records"].append(record)
        print_text(line(record) + "\n")
        write_files({file: to_json(report)})  # a long run may be cut

    for chunk in settings["chunks"]:
        compare_engines(settings, prompts, chunk, on_record)


def _stem(text: str) -> Record:
    """Return the plugin's config, checked as an engine will."""
    from stem_attn.integrations.vllm.settings import parse

    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--stem takes a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"--stem takes a JSON object, got {text!r}")
    try:
        parse(found)
    except ValueError as error:
        raise InputError(f"--stem: {error}") from error
    return found
