"""`stem-attn load`: two servers under the same load, one with dense attention and one with Stem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import METHOD, MODEL, OUTPUT, PROMPT, SeedOption, whole_numbers
from stem_attn.lab.results import Record, check_folder, new_record, print_text, to_json, write_files


def load(
    dense: Annotated[str, typer.Option(metavar="URL", help="A server with dense attention.", rich_help_panel=METHOD)],
    stem: Annotated[str, typer.Option(metavar="URL", help="One of the same model with Stem.", rich_help_panel=METHOD)],
    model: Annotated[
        str, typer.Option(metavar="ID|FOLDER", help="The model, for its tokenizer.", rich_help_panel=MODEL)
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where load.json goes.", rich_help_panel=OUTPUT)],
    lengths: Annotated[
        str, typer.Option(help="Tokens of the shortest and the longest prompt.", rich_help_panel=PROMPT)
    ] = "4096,30000",
    tokens: Annotated[str, typer.Option(help="Likewise of the answers.", rich_help_panel=PROMPT)] = "32,64",
    seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Of each trial, at the rate of what comes all at once; longer below it.", rich_help_panel=PROMPT
        ),
    ] = 30.0,
    trials: Annotated[
        int,
        typer.Option(min=1, help="Rates that are tried on each server; six find it within 2%.", rich_help_panel=PROMPT),
    ] = 6,
    burst: Annotated[int, typer.Option(min=1, help="How many come at once to find that.", rich_help_panel=PROMPT)] = 24,
    short: Annotated[
        int,
        typer.Option(min=0, help="Short prompts at the end, whose tokens are compared.", rich_help_panel=PROMPT),
    ] = 1000,
    short_seconds: Annotated[float, typer.Option(help="In which they come, above 0.", rich_help_panel=PROMPT)] = 20.0,
    seed: SeedOption = 0,
) -> None:
    """Load two servers with the same requests: one with dense attention, one with Stem.

    Prompts are public text, arrivals a Poisson process. Goodput is the highest rate at which 99% of the requests have
    their first token within 3 times what the dense server takes for the longest prompt without load. Both servers are
    searched for theirs at the same time, each at its own pace, and then both get the dense server's. Servers on devices
    of their own do not disturb each other. Every number goes to the file.
    """
    require("transformers", extra="hf")
    if not 0 < short_seconds < math.inf:
        raise InputError(f"--short-seconds takes a number above 0, got {short_seconds:g}")
    if seconds == math.inf:
        raise InputError("--seconds takes a finite number, got inf")
    settings: Record = {
        "model": Path(model).name,
        "lengths": _range("--lengths", lengths),
        "tokens": _range("--tokens", tokens),
        "seconds": seconds,
        "trials": trials,
        "burst": burst,
        "short": short,
        "short_seconds": short_seconds,
        "seed": seed,
    }
    file = out / "load.json"
    check_folder(out, file)

    import torch

    from stem_attn.lab.load.client import Server
    from stem_attn.lab.load.report import line, summary
    from stem_attn.lab.load.run import SERVERS, Prompts, compare_servers
    from stem_attn.lab.models import load_tokenizer

    servers = {name: Server(url) for name, url in zip(SERVERS, (dense, stem), strict=True)}
    tokenizer = load_tokenizer(model)
    report: Record = {**new_record("load", settings, torch.device("cpu")), "records": []}

    def on_record(record: Record) -> None:
        report["records"].append(record)
        print_text(line(record) + "\n")
        write_files({file: to_json(report)})  # a long run may be cut

    compare_servers(servers, Prompts(tokenizer, seed), settings, on_record)
    print_text(summary(report["records"]) + "\n")


def _range(option: str, text: str) -> list[int]:
    found = whole_numbers(option, text)
    if len(found) != 2 or found[0] > found[1]:
        raise InputError(f"{option} takes two rising numbers, got {text!r}")
    return found
