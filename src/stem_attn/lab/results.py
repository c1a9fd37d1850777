"""Results: what every record says beside its numbers, and the one way to write files and to print.

A file is written whole or not at all: first beside its place, then renamed. Where it can be written is found out before
any work, and numbers that could not be written after all are printed.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType

from stem_attn.lab import machine
from stem_attn.lab.errors import InputError

Record = dict[str, Any]

_PIPED_WIDTH = 160  # piped output has no width of its own, and 80 letters would cut the columns
_PROBE_BYTES = 4096


def new_record(command: str, settings: Record, device: torch.device) -> Record:
    """Begin the record of a run; the numbers are added to it.

    Args:
        command: The command's name.
        settings: What was asked for, defaults included, as plain values.
        device: Where the run computes.
    """
    return {
        "command": command,
        "arguments": shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "machine": machine.describe(device),
        "settings": settings,
    }


def check_writable(*paths: Path) -> None:
    """Check, before any work, that results can be written.

    Raises:
        InputError: A path is a folder, its folder is missing or cannot be written, or the disk is full; or two of them
            are one.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.name == "-":
            raise InputError(f"cannot write {path}: only --json - stands for stdout")
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder, and a file was expected")
        if not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: {os.strerror(errno.EACCES)}")
        if _is_plain(path):
            if path.resolve() in seen:
                raise InputError(f"cannot write {path}: two results would go there")
            seen.add(path.resolve())
            part = _part(path)
            try:
                part.write_bytes(bytes(_PROBE_BYTES))
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}") from error
            finally:
                part.unlink(missing_ok=True)


def check_outputs(json_path: str | None, *others: Path | None, inputs: Sequence[Path | None] = ()) -> None:
    """Check what `--json` says and where other results go; see `check_writable`.

    Args:
        json_path: None: nowhere; `-`: stdout.
        *others: None: not asked for.
        inputs: Files that are read, and must not be written over.
    """
    outputs = [path for path in others if path is not None]
    outputs += [Path(json_path)] if json_path not in (None, "-") else []
    read = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path.resolve() in read:
            raise InputError(f"cannot write {path}: it is read, too")
    check_writable(*outputs)


def check_folder(folder: Path, *paths: Path) -> None:
    """Check, before any work, that the folder of `--out` can be made and written to; `write_files` makes it.

    Args:
        folder: It need not be there.
        paths: What will be written, in it or elsewhere.

    Raises:
        InputError: It cannot be made, or `check_writable` raises it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: it is a file, and a folder was expected")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(*paths)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}") from error
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()


def write_files(files: Mapping[Path, str | bytes]) -> None:
    """Write files, each whole or not at all.

    Args:
        files: Contents by path. The first holds every number: if it is text and cannot be written, it is printed.

    Raises:
        InputError: A file could not be written; the others are.
    """
    failed: dict[Path, str] = {}
    for path, content in files.items():
        try:
            _write(path, content.encode() if isinstance(content, str) else content)
        except OSError as error:
            failed[path] = error.strerror or str(error)
    if not failed:
        return
    first, content = next(iter(files.items()))
    kept = ""
    if first in failed and isinstance(content, str):
        print_text(content)
        kept = f"; what {first.name} would hold was printed"
    reasons = ", ".join(f"{path} ({reason})" for path, reason in failed.items())
    raise InputError(f"cannot write {reasons}{kept}")


def deliver(record: Record, view: RenderableType, json_path: str | None) -> None:
    """Write a record where `--json` says, and show the terminal's view of it; on stderr where the record takes stdout.

    Raises:
        InputError: One of them could not be written.
    """
    try:
        if json_path == "-":
            print_text(to_json(record))
        elif json_path is not None:
            write_files({Path(json_path): to_json(record)})
    finally:
        show(view, stderr=json_path == "-")


def show(view: RenderableType, *, stderr: bool = False) -> None:
    """Print what a report drew.

    Raises:
        InputError: The stream cannot be written.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    try:
        Console(stderr=stderr, width=width, highlight=False).print(view)
    except BrokenPipeError:  # nobody reads on, as behind `| head`: no reason to say anything
        raise
    except OSError as error:
        raise InputError(f"cannot print: {error.strerror}") from error


def print_text(text: str) -> None:
    """Print text on stdout as it is.

    Raises:
        InputError: It cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`: no reason to say anything
        raise
    except OSError as error:
        raise InputError(f"cannot print: {error.strerror}") from error


def to_json(record: Record) -> str:
    """Return a record as the text of a file."""
    return json.dumps(record, indent=1) + "\n"


def to_csv(rows: Sequence[Record]) -> str:
    """Return rows as the text of a file; an empty field is a number that does not apply."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_text(view: RenderableType) -> str:
    """Return what a terminal shows as the text of a file."""
    console = Console(file=io.StringIO(), record=True, width=_PIPED_WIDTH)
    console.print(view)
    return console.export_text()


def _write(path: Path, content: bytes) -> None:
    if not _is_plain(path):  # a device or a pipe
        path.write_bytes(content)
        return
    path = path.resolve()  # a link stays, and the file that it leads to is replaced
    part = _part(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content)
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_plain(path: Path) -> bool:
    return path.is_file() or not path.exists()


def _part(path: Path) -> Path:
    """Return the name under which a file is written before it takes its own."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.part")
