"""Answers kept in a file, one line each, so that a run can be interrupted, repeated and extended."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stem_attn.lab.errors import InputError
from stem_attn.lab.results import print_text

_LINE_STARTS = b'{"key": '
# Fields of a config that answers may be older than, and what stood in their place before there was a choice.
_LATER = {"precision": "auto"}


class Store:
    """Find records by their key: every setting that the answer depends on.

    Args:
        file: JSON lines, one record each; read at once, appended to by `add`. None keeps records in memory only.

    Attributes:
        records: By the text of their key, in the order of the file.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.records: dict[str, dict[str, Any]] = {}
        if file is not None:
            self.records = _open(file)

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record of a key, if there is one."""
        return self.records.get(_text(key))

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Keep records; each has its `key`.

        Raises:
            InputError: The file cannot be written. The records are printed, as the lines that would stand there.
        """
        new = {_text(record["key"]): record for record in records}
        self.records |= new
        if self._file is not None:
            text = "".join(json.dumps(record) + "\n" for record in new.values())
            try:
                with self._file.open("a", encoding="utf-8") as lines:
                    lines.write(text)
            except OSError as error:
                print_text(text)
                raise InputError(
                    f"cannot write {self._file}: {error.strerror}; the last {len(new)} answers were printed"
                ) from error


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _open(file: Path) -> dict[str, dict[str, Any]]:
    """Read a file that will be appended to; cut off what an interrupted write has left."""
    try:
        # A path that cannot be written is refused before any work, and a command that is refused later leaves no file.
        if not file.exists():
            with tempfile.TemporaryFile(dir=file.parent):
                return {}
        file.touch()
        content = file.read_bytes()
        records = read_answers(file)  # a file of something else is refused before anything of it is cut
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            if not content[whole:].startswith(_LINE_STARTS[: len(content) - whole]):
                raise InputError(f"{file}: its last line is not a record of this command")
            with file.open("r+b") as lines:
                lines.truncate(whole)
    except OSError as error:
        raise InputError(f"cannot use {file} for --out: {error.strerror}") from error
    return records


def read_answers(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by the text of their key; a line that is not whole yet is left out.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    records = {}
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["key"], dict):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{file}, line {number}: not a record of this command, which is a JSON object with a key"
            ) from error
        record["key"] = _completed(record["key"])
        records[_text(record["key"])] = record
    return records


def _completed(settings: Any) -> Any:
    """Give the configs in an older record's key the fields that came later, so that today's key still finds it."""
    if not isinstance(settings, dict):
        return settings
    known = {name: _completed(value) for name, value in settings.items()}
    # Every config has a residual. What it lacks stands last: records are written again as they were read.
    return {**known, **_LATER, **known} if "residual" in known else known
