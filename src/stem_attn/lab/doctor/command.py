"""`stem-attn doctor`: what works here and why not, and whether it computes the right thing."""

from __future__ import annotations

import typer

from stem_attn.lab.options import JsonOption
from stem_attn.lab.results import Record, check_outputs, deliver, new_record


def doctor(json_path: JsonOption = None) -> None:
    """Say which backends and integrations work here, check them against float64, and show all versions.

    Takes seconds. What it prints is what a bug report needs; paths and user names are left out.

    Exit code 1 if something that is available computes something wrong.
    """
    check_outputs(json_path)

    from stem_attn.lab.devices import pick_device
    from stem_attn.lab.doctor import run
    from stem_attn.lab.doctor.private import without_private_parts
    from stem_attn.lab.doctor.report import render

    found: Record = {
        **new_record("doctor", run.SETTINGS, pick_device("auto")),
        "arguments": "doctor",  # what else was given is where the file goes
        "backends": run.examine_backends(),
        "integrations": run.examine_integrations(),
    }
    found = without_private_parts(found)
    deliver(found, render(found), json_path)
    if run.is_wrong(found):
        raise typer.Exit(1)
