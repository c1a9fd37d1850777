"""`stem-attn tune`: budgets by layer for a fidelity target, into a config file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from stem_attn.lab.configs import plain_settings, settings_from_options
from stem_attn.lab.devices import check_dtype, name_of
from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import (
    OUTPUT,
    PROMPT,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    GgufOption,
    LengthOption,
    LogitStrideOption,
    ModelOption,
    PresetOption,
    SetOption,
    TextFileOption,
    load_model,
)
from stem_attn.lab.progress import OnStep, show_progress
from stem_attn.lab.results import Record, check_writable, new_record, show, to_json, write_files

_SEED = 0


def tune(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where the config goes, as JSON; beside it FILE.tune.json with all numbers.",
            rich_help_panel=OUTPUT,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="KIND=VALUE",
            help="kl=NATS: mean KL to the dense model of at most so much. top1=SHARE: the same next token at so many "
            "positions. drift=NATS: dense attention's own answers lose at most so much log-probability a token. "
            "agreement=SHARE: so many answers are dense attention's.",
        ),
    ] = "kl=0.01",
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    length: LengthOption = 4096,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts to tune on.", rich_help_panel=PROMPT)] = 2,
    held_out: Annotated[
        int, typer.Option(min=0, metavar="N", help="Further prompts, to check the answer on.", rich_help_panel=PROMPT)
    ] = 2,
    text_file: TextFileOption = None,
    preset: PresetOption = "default",
    config_file: ConfigOption = None,
    override: SetOption = None,
    logit_stride: LogitStrideOption = 4,
) -> None:
    """Find the budget of every layer that reaches a fidelity target at least cost, and write a config file.

    The file is what --config of other commands, config:FILE of --variant, vLLM's config_file and
    stem_attn.policy.read_settings read. Budgets scale with the prompt; tune at the length that matters to you.
    """
    require("transformers", "gguf", extra="demo")
    from stem_attn.lab.can_attend import check_can_attend
    from stem_attn.lab.tune.target import parse_target

    # Everything that can be refused without the model is refused before it loads.
    wanted = parse_target(target)
    config, policy = settings_from_options(preset, override or [], config_file)
    if length < policy.min_seq_len:
        raise InputError(
            f"--length {length} is below this config's min_seq_len of {policy.min_seq_len}, and nothing would be "
            f"sparse: take longer prompts or --set min_seq_len={length}"
        )
    check_dtype(dtype)
    record_path = out.with_suffix(".tune.json")
    check_writable(out, record_path)

    import torch

    from stem_attn.lab.texts import excerpts
    from stem_attn.lab.tune import run as search
    from stem_attn.lab.tune.found import describe
    from stem_attn.lab.tune.recall import ask_for_the_rest
    from stem_attn.lab.tune.report import render

    torch.manual_seed(_SEED)
    loaded = load_model(model, gguf, device, dtype)
    check_can_attend(loaded.model, config)
    if length > loaded.context_tokens:
        raise InputError(f"--length {length} is more than the model's context of {loaded.context_tokens} tokens")
    texts = excerpts(loaded.tokenizer, length, prompts + held_out, text_file or [])
    ids = [text.ids for text in texts]
    if wanted.asks_answers:
        ids = [ask_for_the_rest(one, seed) for seed, one in enumerate(ids)]
    settings: Record = {
        "target": str(wanted),
        "length": length,
        "prompts": prompts,
        "held_out": held_out,
        "logit_stride": logit_stride,
        "preset": preset,
        "config": plain_settings(config, policy),
        "seed": _SEED,
    }
    record: Record = {
        **new_record("tune", settings, loaded.model.device),
        "model": {"name": loaded.name, "dtype": name_of(loaded.model.dtype)},
        "texts": [text.describe() for text in texts],
    }
    layers = loaded.model.config.get_text_config().num_hidden_layers
    most = search.most_forwards(config, length, layers, prompts, held_out)
    print(f"tune: at most {most} forwards of {length} tokens", file=sys.stderr, flush=True)
    with show_progress("tune", "forwards", most, at_most=True) as progress:
        start = time.perf_counter()
        starts = _tell_seconds(progress.starts, prompts + 1, most)
        found = search.tune(
            loaded.model, ids[:prompts], config, policy, wanted, logit_stride=logit_stride, on_step=starts
        )
        record["seconds"] = round(time.perf_counter() - start, 1)
        record |= describe(found, wanted)
        write_files({record_path: to_json(record), out: to_json(record["config"])})
        if held_out:
            record["held_out"] = search.check(
                loaded.model, ids[prompts:], found, logit_stride=logit_stride, on_step=progress.starts
            )
            write_files({record_path: to_json(record)})
    show(render(record, str(out)))


def _tell_seconds(on_step: OnStep, nth: int, most: int) -> OnStep:
    """Say on stderr how long all forwards will take, by the nth, the first sparse one: earlier ones do more.

    Args:
        on_step: What is told too.
        nth: Counted from 1.
        most: Forwards in all.
    """
    begun: list[float] = []

    def starts(step: str) -> None:
        on_step(step)
        begun.append(time.perf_counter())
        if len(begun) == nth + 1:
            one = begun[nth] - begun[nth - 1]
            print(f"tune: one takes {one:.1f} s, all at most {most * one:.0f} s", file=sys.stderr, flush=True)

    return starts
