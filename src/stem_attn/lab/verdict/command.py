"""`stem-attn report`: result files of other commands in one page, and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stem_attn.lab.errors import require
from stem_attn.lab.options import OUTPUT
from stem_attn.lab.results import check_outputs, print_text, write_files


def verdict(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folders with result files, or such files, of bench, eval, tune, serving, prefill, inspect.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.", rich_help_panel=OUTPUT)] = Path(
        "stem-report.html"
    ),
) -> None:
    """Put result files into one page that says whether Stem is worth it for your model and lengths.

    The verdict follows from the numbers, which stand below it with the settings that they were measured with.
    """
    require("jinja2", extra="eval")
    from stem_attn.lab.verdict.read import json_files, read
    from stem_attn.lab.verdict.report import page
    from stem_attn.lab.verdict.run import headline, judge

    check_outputs(None, out, inputs=list(json_files(folders)))
    found = read(folders)
    judgements = judge(found)
    write_files({out: page(found, judgements)})
    print_text(f"{headline(judgements)}\n{out}\n")
