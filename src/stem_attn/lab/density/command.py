"""`stem-attn density`: what presets take that keep the same share of blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stem_attn.lab.devices import pick_device
from stem_attn.lab.errors import InputError
from stem_attn.lab.options import DeviceOption, densities, listed, whole_numbers
from stem_attn.lab.results import Record, check_folder, new_record, show, to_json, write_files


def density(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where equal_density.json goes.")],
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "32768,65536,131072",
    wanted: Annotated[
        str, typer.Option("--densities", help="Kept over causal blocks, separated by commas.")
    ] = "0.12,0.22",
    presets: Annotated[str, typer.Option(help="Compared with the first one.")] = "official,default",
    rounds: Annotated[int, typer.Option(min=1, help="Everything is timed once a round.")] = 15,
    device: DeviceOption = "auto",
) -> None:
    """Time presets at equal density: selection, attention and the whole operation of one layer.

    The layer has Llama-3.1-8B's heads, and random tokens with some structure, so that blocks and heads differ.
    """
    from stem_attn.config import PRESETS
    from stem_attn.lab.density.report import render
    from stem_attn.lab.density.run import time_presets

    names = listed(presets)
    unknown = [name for name in names if name not in PRESETS]
    if unknown or not names:
        raise InputError(f"--presets: unknown {', '.join(unknown) or '(none)'}; known: {', '.join(PRESETS)}")
    settings: Record = {
        "lengths": whole_numbers("--lengths", lengths),
        "densities": densities("--densities", wanted),
        "presets": names,
        "rounds": rounds,
    }
    where = pick_device(device)
    file = out / "equal_density.json"
    check_folder(out, file)
    report: Record = {**new_record("density", settings, where), "records": []}
    for tokens in settings["lengths"]:
        for share in settings["densities"]:
            print(f"{tokens} tokens at density {share:g}", file=sys.stderr, flush=True)
            report["records"] += time_presets(names, tokens, share, where, rounds)
            write_files({file: to_json(report)})  # a long run may be cut
    show(render(report["records"]))
