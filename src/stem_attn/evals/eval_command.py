"""`stem-attn eval`: the evaluations of accuracy, one command each.

A command's module imports only typer and what is light at its top; the rest is imported when the command runs.
"""

from __future__ import annotations

import typer

from stem_attn.evals.fidelity_command import fidelity
from stem_attn.evals.ruler.command import ruler


def eval_app() -> typer.Typer:
    """Return the sub-application that holds every evaluation's command."""
    app = typer.Typer(help="Measure accuracy against dense attention.")
    app.command()(fidelity)
    app.command()(ruler)
    return app
