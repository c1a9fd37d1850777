"""The command `stem-attn`. The commands live next to their jobs; this module puts them together."""

import inspect
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from stem_attn import __version__
from stem_attn.lab.errors import InputError, require

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the command line of this process and exit."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _fail(f"cannot print: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more at the very end
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: What follows the command's name.

    Returns:
        The exit code: 0, 2 where the input cannot be used (one line on stderr says why), 130 if interrupted.
    """
    try:
        require("typer", "rich", extra="demo")  # what every command imports beyond torch
    except InputError as error:
        return _fail(str(error))
    from typer import Abort
    from typer.main import get_command

    try:
        # Outside standalone mode typer raises its errors, so that they look like ours.
        result = get_command(_app()).main(list(arguments) or ["--help"], prog_name="stem-attn", standalone_mode=False)
    except (Abort, KeyboardInterrupt):
        print("stem-attn: interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:  # a full disk, a file that is gone
        return _fail(str(error))
    except Exception as error:
        # Its error classes have changed modules; they share this method.
        if not hasattr(error, "format_message"):
            raise
        return _fail(_usage(error, arguments))
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    print(f"stem-attn: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """Say what typer says, the value that came, which it leaves out, and where to read what is expected."""
    message: str = error.format_message().rstrip(".")
    names = getattr(getattr(error, "param", None), "opts", ())
    came = [value for name, value in itertools.pairwise(arguments) if name in names]
    came += [value for name, equals, value in (text.partition("=") for text in arguments) if equals and name in names]
    if came and repr(came[-1]) not in message:
        message += f", got {came[-1]!r}"
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message}; see {context.command_path} --help"


def _add(app: "typer.Typer", *commands: Callable[..., None], name: str | None = None) -> None:
    """Add commands; typer would keep the line breaks of their docstrings, and a narrow terminal would add its own."""
    for command in commands:
        paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
        app.command(name, help="\n\n".join(text.replace("\n", " ") for text in paragraphs))(command)


def _app() -> "typer.Typer":
    import typer

    from stem_attn.lab.audit.command import audit
    from stem_attn.lab.bench.command import bench
    from stem_attn.lab.density.command import density
    from stem_attn.lab.doctor.command import doctor
    from stem_attn.lab.fidelity.command import fidelity
    from stem_attn.lab.inspect.command import inspect as inspect_prompt
    from stem_attn.lab.load.command import load
    from stem_attn.lab.prefill.command import prefill
    from stem_attn.lab.serving.command import serving
    from stem_attn.lab.tasks.command import ruler, tasks
    from stem_attn.lab.tasks.report_command import report
    from stem_attn.lab.tune.command import tune
    from stem_attn.lab.verdict.command import verdict

    app = typer.Typer(
        help="Stem: training-free sparse attention for the prefill of long prompts (arXiv 2603.06274).",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"stem-attn {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    _add(app, doctor, prefill, inspect_prompt, bench, density, serving, load, tune)
    _add(app, verdict, name="report")
    accuracy = typer.Typer(
        help="Measure accuracy against dense attention. Methods are sparse even where so much is kept that an adapter "
        "would stay dense (its crossover is off)."
    )

    @accuracy.callback(invoke_without_command=True)
    def measure(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    _add(accuracy, fidelity, ruler, tasks, report, audit)
    app.add_typer(accuracy, name="eval")
    return app
