"""The file of answers."""

import gzip
import json
from pathlib import Path

import pytest

from stem_attn.lab.errors import InputError
from stem_attn.lab.named_methods import parse_methods
from stem_attn.lab.tasks import run
from stem_attn.lab.tasks.store import Store, read_answers

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_the_store_finds_again_what_was_added(tmp_path):
    file = tmp_path / "answers.jsonl"
    store = Store(file)
    assert not file.exists()  # a command that is refused by now leaves nothing
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


@pytest.mark.parametrize("name", ["stem-default", "uniform", "xattention+tail"])
def test_answers_older_than_a_field_are_found_by_todays_key(tmp_path, name):
    """What they lack is what was always so before: a field's default today may be something else."""
    file, key = tmp_path / "answers.jsonl", {"task": "vt", "method": settings_of(name)}
    key = json.loads(json.dumps(key))  # as a file gives it back
    older = json.loads(json.dumps(key))
    del older["method"].get("config", older["method"])["precision"]
    assert older != key
    Store(file).add([{"key": older, "score": 1.0}])
    assert Store(file).get(key) == {"key": key, "score": 1.0}
    asked = json.loads(json.dumps(key))
    asked["method"].get("config", asked["method"])["precision"] = "fp8"
    assert Store(file).get(asked) is None


def test_committed_answers_can_be_added_to(tmp_path):
    """Whoever adds a field to a config says in the store what answers before it had."""
    files = list(RESULTS.glob("*/answers.jsonl.gz"))
    assert files
    found = set()
    for packed in files:
        file = tmp_path / packed.parent.name
        file.write_bytes(gzip.decompress(packed.read_bytes()))
        methods = [record["key"]["method"] for record in read_answers(file).values()]
        bases = {method["base"] for method in methods}
        assert {"dense", "stem-default"} <= bases
        found |= bases
        for method in methods:
            wanted = settings_of(method["base"] + "+tail" * ("at" in method))
            assert set(method) == set(wanted)
            assert set(method.get("config", ())) == set(wanted.get("config", ()))
    assert "xattention" in found


def settings_of(name):
    (named,) = parse_methods(name)
    settings = run.Settings(("vt",), (32768,), (0,), (named,), 128, None, True, 1234)
    return run._method_settings(named, settings)
