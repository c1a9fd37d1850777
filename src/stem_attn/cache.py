"""The folder for what is made once on a machine and found again: converted models, compiled kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "STEM_ATTN_CACHE"


def cache_folder() -> Path:
    """Return `$STEM_ATTN_CACHE`, or this package's part of the user's cache folder.

    Raises:
        RuntimeError: The user has no home.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).absolute()
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        root = str(Path.home() / "Library" / "Caches")
    else:
        root = os.environ.get("XDG_CACHE_HOME")
    return Path(root or Path.home() / ".cache") / "stem-attn"
