"""Compile a C++ file for the CPU at hand, once, and load it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from stem_attn.cache import cache_folder

_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300  # more than any compiler needs
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")


def load(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Load a source's compiled form from the cache folder; compile it if it is not there or cannot be loaded.

    Processes that compile at once replace each other's file by an equal one. Without a cache folder that can be
    written, or that others may write too, the compiled form lives as long as the process.

    Args:
        source: A C++17 file that needs nothing but the standard library and threads.

    Returns:
        The library, or None, with the reason why there is none, as a clause.
    """
    flags = [*_FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    # What it is made from, but not the compiler: a machine without one may use what was compiled before.
    origin = [source.read_text(), *flags, os.environ.get("CXX", ""), _cpu()]
    name = f"{source.stem}-{hashlib.sha256(repr(origin).encode()).hexdigest()[:16]}.so"
    kept: Path | None = None
    with contextlib.suppress(OSError, RuntimeError):  # not there yet, or made on another system; no home
        kept = cache_folder() / "kernels"  # a folder of its own, whatever rights the whole has
        if _is_ours(kept) and _is_ours(kept / name):
            return ctypes.CDLL(str(kept / name)), None

    compilers = _compilers()
    if not compilers:
        return None, f"there is no C++ compiler: none of $CXX, {', '.join(_COMPILERS)} is found"
    reason = None
    with _scratch(kept) as scratch:
        made = Path(scratch, name)
        for compiler in compilers:
            reason = _compile([*compiler, *flags, str(source), "-o", str(made)])
            if reason:
                continue
            try:
                library = ctypes.CDLL(str(made))
            except OSError as error:
                reason = f"what {compiler[0]} has compiled cannot be loaded: {error}"
                continue
            if kept is not None:
                with contextlib.suppress(OSError):
                    if _is_ours(kept):
                        made.chmod(0o700)
                        made.replace(kept / name)
            return library, None
    return None, reason


def _scratch(kept: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Make a folder to compile in: beside what is kept, so that the result can be renamed, or elsewhere."""
    if kept is not None:
        with contextlib.suppress(OSError):
            kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_ours(kept):
                return tempfile.TemporaryDirectory(prefix=".compiling-", dir=kept)
    return tempfile.TemporaryDirectory(prefix="stem-attn-")


def _is_ours(path: Path) -> bool:
    """Tell whether nobody but this user and root can write a file or folder: what is loaded from it is run."""
    found = path.stat()
    return not hasattr(os, "geteuid") or (found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022)


def _compilers() -> list[list[str]]:
    """Return the commands to try: the user's choice alone, or else what is found of the usual ones."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = [chosen] if chosen else [[name] for name in _COMPILERS]
    return [command for command in candidates if shutil.which(command[0])]


def _compile(command: list[str]) -> str | None:
    """Run a compiler; return why it failed, if it did."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C++ compiler {command[0]} cannot be run: {error}"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
    return f"the C++ compiler {command[0]} fails: {lines[0][:200]}"


def _cpu() -> str:
    """Describe what decides which instructions `native` stands for."""
    told = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines():
            if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                told.append(line)
    return "\n".join(told)
