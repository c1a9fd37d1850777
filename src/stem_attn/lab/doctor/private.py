"""Leave out of a report what says who and where its user is: other packages' errors name files."""

from __future__ import annotations

import contextlib
import getpass
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

_SITE = re.compile(r"[^\s'\"(,;]*[/\\](?:site|dist)-packages[/\\]")
_ABSOLUTE = re.compile(r"(?<![\w/\\.<>\]-])(?:~?/|[A-Za-z]:[/\\]|\\\\)[^\s'\"(),;:]*[^\s'\"(),;:.]")


def without_private_parts(value: Value) -> Value:
    """Return plain values with no path of this machine, and without the user's name, in any of their texts."""
    cleaned: Value = _cleaned(value, _folders(), _user())
    return cleaned


def _cleaned(value: Any, folders: list[str], user: str | None) -> Any:
    if isinstance(value, dict):
        return {name: _cleaned(item, folders, user) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item, folders, user) for item in value]
    if not isinstance(value, str):
        return value
    text = _SITE.sub("", value)  # what follows says which package's file it is
    for folder in folders:  # before the pattern, which ends at a space
        text = text.replace(folder, "/...")
    text = _ABSOLUTE.sub(_shortened, text)
    return text if user is None else re.sub(rf"(?<!\w){re.escape(user)}(?!\w)", "...", text)


def _shortened(path: re.Match[str]) -> str:
    """Keep the name of a library or module, which says what failed."""
    name = re.split(r"[/\\]", path[0])[-1]
    return f".../{name}" if re.search(r"\.(?:py|so(?:\.\d+)*|dll|dylib|pyd)$", name) else "..."


def _folders() -> list[str]:
    """Return the folders that say something about the user, the longest first."""
    found = {sys.prefix, sys.base_prefix, tempfile.gettempdir()}
    with contextlib.suppress(RuntimeError):  # nobody's home
        found.add(str(Path.home()))
    with contextlib.suppress(OSError):  # a folder that is gone
        found.add(str(Path.cwd()))
    return sorted((folder for folder in found if len(folder) > 1), key=len, reverse=True)


def _user() -> str | None:
    try:
        return getpass.getuser() or None
    except (ImportError, KeyError, OSError):  # one without a name
        return None
