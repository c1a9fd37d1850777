"""The error of the command line, and its check for optional packages."""

from importlib.util import find_spec
from pathlib import Path


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


def check_writable(path: Path) -> None:
    """Check, before any work, that a result can be written.

    Raises:
        InputError: The path is a folder, or its folder does not exist.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist, or it is a folder")
