"""`stem-attn eval report`: the tables of answers that one or several runs have kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import OUTPUT, JsonOption
from stem_attn.lab.results import Record, check_outputs, deliver, new_record, write_files


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What runs were given as --out.")],
    json_path: JsonOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a PNG of drift and agreement by density (needs matplotlib).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Show the tables of answers that runs of `eval tasks` or `eval ruler` have kept, without the model.

    The files may be of processes that shared the work, and of methods that ran at different times: of one model, with
    one seed.
    """
    require("transformers", "wonderwords", extra="eval")
    if plot is not None:
        require("matplotlib", extra="eval")
    check_outputs(json_path, plot, inputs=files)
    import torch

    from stem_attn.lab.tasks.report import render
    from stem_attn.lab.tasks.store import read_answers
    from stem_attn.lab.tasks.summary import summarize

    stored = {text: record for file in files for text, record in read_answers(file).items()}
    records = [{**record, **record["key"], "method": record["name"]} for record in stored.values()]
    if not records:
        raise InputError("the files hold no answers")
    for name in ("record", "model", "weights", "dtype", "device", "seed"):
        held = {record.get(name) for record in records}
        if len(held) > 1:
            raise InputError(f"the files hold answers of more than one {name}: {', '.join(sorted(map(str, held)))}")
    _check_prompts(records)
    _tell_apart(records)
    settings = {"files": [str(file) for file in files], "methods": _methods(records)}
    found = {**new_record("report", settings, torch.device("cpu")), **summarize(records)}
    if plot is not None:
        from stem_attn.lab.tasks.plot import draw

        write_files({plot: draw(found)})
    deliver(found, render(found), json_path)


def _check_prompts(records: list[Record]) -> None:
    """Refuse answers to different prompts: what is compared is paired."""
    hashes: dict[tuple[str, int, int], str] = {}
    for record in records:
        place = task, length, index = record["task"], record["length"], record["index"]
        if hashes.setdefault(place, record["prompt_sha256"]) != record["prompt_sha256"]:
            raise InputError(
                f"the files hold answers to different prompts of {task} at {length} tokens, sample {index}: one of the "
                f"runs had another --template, tokenizer or text, or another version of stem-attn or torch; give the "
                f"files of one"
            )


def _methods(records: list[Record]) -> list[Record]:
    """Return every method once: its name, what it is a variant of, and its settings."""
    fields = {record["method"]: dict(record["key"]["method"]) for record in records}
    return [{"name": name, "base": own.pop("base"), "fields": own} for name, own in fields.items()]


def _tell_apart(records: list[Record]) -> None:
    """Add the density to the names of methods that ran at several; refuse one name for other settings that differ."""
    densities: dict[str, set[float | None]] = {}
    for record in records:
        densities.setdefault(record["method"], set()).add(record["key"]["method"].get("density"))
    settings: dict[str, str] = {}
    for record in records:
        if len(densities[record["method"]]) > 1:
            density = record["key"]["method"]["density"]
            record["method"] += " with its own budget" if density is None else f" at {density:g}"
        text = json.dumps(record["key"]["method"], sort_keys=True)
        if settings.setdefault(record["method"], text) != text:
            raise InputError(
                f"the files hold answers of two methods called {record['method']}, with different settings; run one of "
                f"them as a --variant under another name, or give fewer files"
            )
