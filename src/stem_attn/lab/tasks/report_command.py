"""`stem-attn eval report`: the tables of answers that one or several runs have kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stem_attn.lab.errors import InputError, check_writable, require

JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write scores and settings as JSON; with - to stdout, and the tables to stderr.",
        rich_help_panel="Output",
    ),
]


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What runs were given as --out.")],
    json_path: JsonOption = None,
) -> None:
    """Show the tables of answers that runs of `eval tasks` or `eval ruler` have kept, without the model.

    The files may be of processes that shared the work, and of methods that ran at different times: of one model, with
    one seed.
    """
    require("transformers", "wonderwords", extra="eval")
    from stem_attn.lab.tasks.store import Store
    from stem_attn.lab.tasks.summary import summarize

    for file in files:
        if not file.is_file():
            raise InputError(f"no such file: {file}")
    if json_path not in (None, "-"):
        check_writable(Path(json_path))
    stored = {text: record for file in files for text, record in Store(file).records.items()}
    records = [{**record, **record["key"], "method": record["name"]} for record in stored.values()]
    if not records:
        raise InputError("the files hold no answers")
    for name in ("record", "model", "weights", "dtype", "device", "seed"):
        held = {record.get(name) for record in records}
        if len(held) > 1:
            raise InputError(f"the files hold answers of more than one {name}: {', '.join(sorted(map(str, held)))}")
    _check_names(records)
    show(summarize(records), json_path)


def show(found: dict[str, Any], json_path: str | None) -> None:
    """Print tables, and write what they were made of.

    Args:
        found: See `tables.render`.
        json_path: A file, `"-"` for stdout, where the tables go to stderr, or None.
    """
    from rich.console import Console

    from stem_attn.lab.tasks.tables import render

    if json_path == "-":
        print(json.dumps(found, indent=2))
    elif json_path is not None:
        Path(json_path).write_text(json.dumps(found, indent=2) + "\n")
    Console(stderr=json_path == "-").print(render(found))


def _check_names(records: list[dict[str, Any]]) -> None:
    """Refuse one name for methods of different settings."""
    settings: dict[str, str] = {}
    for record in records:
        text = json.dumps(record["key"]["method"], sort_keys=True)
        if settings.setdefault(record["method"], text) != text:
            raise InputError(
                f"the files hold answers of two methods called {record['method']}, with different settings; run one of "
                f"them as a --variant under another name, or give fewer files"
            )
