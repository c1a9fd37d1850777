"""The error of the command line, and its check for optional packages."""

from importlib.util import find_spec


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that the command line shows as it is."""


def require(*packages: str, extra: str) -> None:
    """Check that packages can be imported.

    Args:
        packages: Import names.
        extra: The extra of this distribution that installs them.

    Raises:
        InputError: One is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(f'this needs {", ".join(missing)}: pip install "stem-attn[{extra}]"')


def first_line(error: BaseException) -> str:
    """Return the first line of another package's error, or the name of its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
