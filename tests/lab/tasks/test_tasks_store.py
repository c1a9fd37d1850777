"""The file of answers."""

import gzip
import json

import pytest

from stem_attn.lab.errors import InputError
from stem_attn.lab.tasks.store import Store, read_answers


def test_the_store_finds_again_what_was_added(tmp_path):
    file = tmp_path / "answers.jsonl"
    store = Store(file)
    assert file.exists()
    store.add([{"key": {"task": "vt", "index": 1}, "score": 50.0}])
    again = Store(file)
    assert again.get({"index": 1, "task": "vt"}) == {"key": {"task": "vt", "index": 1}, "score": 50.0}
    assert again.get({"index": 2, "task": "vt"}) is None


def test_an_interrupted_line_is_dropped_and_a_foreign_one_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    Store(file).add([{"key": {"index": i}} for i in range(2)])
    with file.open("a") as lines:
        lines.write('{"key": {"ind')
    store = Store(file)
    store.add([{"key": {"index": 2}}])
    assert [json.loads(line)["key"]["index"] for line in file.read_text().splitlines()] == [0, 1, 2]
    file.write_text('{"key": {}}\n{"score": 1}\n{"k')
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: not a record"):
        Store(file)
    assert file.read_text().endswith('{"k')  # what is refused is left as it was
    file.write_text("notes of mine, without an end of the line")
    with pytest.raises(InputError, match=r"answers\.jsonl: its last line is not a record"):
        Store(file)
    assert file.read_text().startswith("notes of mine")
    with pytest.raises(InputError, match=r"cannot use .* for --out"):
        Store(tmp_path / "nowhere" / "answers.jsonl")


def test_a_packed_file_is_refused_without_its_bytes(tmp_path):
    file = tmp_path / "answers.jsonl.gz"
    file.write_bytes(gzip.compress(bytes(range(256)) * 20) + b"\n")
    with pytest.raises(InputError, match="line 1: not a record of this command") as caught:
        read_answers(file)
    assert "\\x" not in str(caught.value)
    assert len(str(caught.value)) < len(str(file)) + 150


def test_reading_alone_changes_nothing(tmp_path):
    file = tmp_path / "answers.jsonl"
    Store(file).add([{"key": {"index": 1}}])
    with file.open("a") as lines:
        lines.write('{"key": {"ind')  # another process is writing
    before = file.read_bytes()
    assert list(read_answers(file).values()) == [{"key": {"index": 1}}]
    assert file.read_bytes() == before
