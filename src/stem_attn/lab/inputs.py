"""Text files that options name; `-` is stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from stem_attn.lab.errors import InputError


def read_text(path: Path) -> tuple[str, str]:
    """Return a file's text and its name; `-` is stdin.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or is empty, as stdin is for the second option that names it.
    """
    piped = str(path) == "-"
    name = "stdin" if piped else str(path)
    try:
        text = (sys.stdin.buffer.read() if piped else path.read_bytes()).decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise InputError(f"{name} is empty" + (", or another option has read it" if piped else ""))
    return text, name
