"""`stem-attn tune`: budgets by layer for a fidelity target, into a config file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from stem_attn.lab.errors import InputError, check_writable, require
from stem_attn.lab.model_options import DeviceOption, DtypeOption, GgufOption, ModelOption, check_dtype, load_model
from stem_attn.lab.options import CONFIG_HELP, config_from_options

_TEXT, _METHOD = "Text", "Method"
_SEED = 0


def tune(
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where the config goes, as JSON; beside it FILE.tune.json with all numbers."),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="KIND=VALUE",
            help="kl=NATS: mean KL to the dense model of at most so much. top1=SHARE: the same next token at so many "
            "positions.",
        ),
    ] = "kl=0.01",
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    length: Annotated[int, typer.Option(min=64, metavar="N", help="Tokens of a prompt.", rich_help_panel=_TEXT)] = 4096,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts to tune on.", rich_help_panel=_TEXT)] = 2,
    held_out: Annotated[
        int, typer.Option(min=0, metavar="N", help="Further prompts, to check the answer on.", rich_help_panel=_TEXT)
    ] = 2,
    text_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Document of your own, UTF-8; may be repeated. Default: Python's language reference, the source of "
            "its standard library, and PyTorch's reference pages.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="default, official or paper.", rich_help_panel=_METHOD)
    ] = "default",
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP, rich_help_panel=_METHOD)
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a setting; may be repeated.", rich_help_panel=_METHOD
        ),
    ] = None,
    logit_stride: Annotated[
        int, typer.Option(min=1, metavar="N", help="Compare the predictions of every N-th position.")
    ] = 1,
) -> None:
    """Find the budget of every layer that reaches a fidelity target at least cost, and write a config file.

    The file is what --config of other commands, config:FILE of --variant, vLLM's config_file and
    StemConfig.from_json read. Budgets scale with the prompt; tune at the length that matters to you.
    """
    require("transformers", "gguf", extra="dev")
    from stem_attn.lab.tune.run import parse_target

    # Everything that can be refused without the model is refused before it loads.
    wanted = parse_target(target)
    config = config_from_options(preset, override or [], config_file)
    if length < config.min_seq_len:
        raise InputError(
            f"--length {length} is below this config's min_seq_len of {config.min_seq_len}, and nothing would be "
            f"sparse: take longer prompts or --set min_seq_len={length}"
        )
    check_dtype(dtype)
    record_path = out.with_suffix(".tune.json")
    check_writable(out)
    check_writable(record_path)

    import torch
    from rich.console import Console

    from stem_attn.lab import machine
    from stem_attn.lab.texts import excerpts
    from stem_attn.lab.tune import run as search
    from stem_attn.lab.tune.report import render

    torch.manual_seed(_SEED)
    loaded = load_model(model, gguf, device, dtype)
    if length > loaded.context_tokens:
        raise InputError(f"--length {length} is more than the model's context of {loaded.context_tokens} tokens")
    texts = excerpts(loaded.tokenizer, length, prompts + held_out, text_file or [])
    ids = [text.ids for text in texts]
    record: dict[str, Any] = {
        "command": "tune",
        "target": str(wanted),
        "settings": {"length": length, "prompts": prompts, "held_out": held_out, "logit_stride": logit_stride},
        "seed": _SEED,
        "preset": preset,
        "model": {"name": loaded.name, "dtype": str(loaded.model.dtype).removeprefix("torch.")},
        "machine": machine.describe(loaded.model.device),
        "texts": [text.describe() for text in texts],
    }
    with _progress() as on_step:
        start = time.perf_counter()
        found = search.tune(loaded.model, ids[:prompts], config, wanted, logit_stride=logit_stride, on_step=on_step)
        record["seconds"] = round(time.perf_counter() - start, 1)
        out.write_text(found.config.to_json() + "\n")
        record |= search.describe(found, wanted)
        if held_out:
            record["held_out"] = search.check(
                loaded.model, ids[prompts:], found, logit_stride=logit_stride, on_step=on_step
            )
    record_path.write_text(json.dumps(record, indent=2) + "\n")
    width = None if sys.stdout.isatty() else 120  # piped output has no width of its own
    Console(width=width, highlight=False).print(render(record, str(out)))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show a bar that names every forward as it starts."""
    from transformers.utils import logging

    with logging.tqdm(desc="tune", unit="forward", leave=False) as bar:

        def on_step(step: str) -> None:
            bar.set_description(f"tune, {step}")
            bar.update()

        yield on_step
