"""The one way to write results: checked before the work, whole or not at all, and never lost."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.text import Text

import stem_attn
from stem_attn.lab import results
from stem_attn.lab.errors import InputError

SOURCE = str(Path(stem_attn.__file__).parent.parent)


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that fills up after the check."""
    write = Path.write_bytes

    def fail(self, content):
        if self.name.endswith(".part") and any(content):
            write(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fail)


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    results.check_writable(path)
    assert path.read_text() == "old"
    results.write_files({path: "new", tmp_path / "b.png": b"\x89"})
    assert (path.read_text(), (tmp_path / "b.png").read_bytes()) == ("new", b"\x89")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.png"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "folder" / "file.json"
    file.write_text("old")
    link.symlink_to(file)
    results.check_writable(link)
    results.write_files({link: "new"})
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert [p.name for p in file.parent.iterdir()] == ["file.json"]


def test_devices_are_written_to_and_stay(tmp_path):
    null, full = Path("/dev/null"), Path("/dev/full")
    results.check_writable(null)
    results.write_files({null: "x"})
    assert null.is_char_device()
    with pytest.raises(InputError, match=r"/dev/full .No space left on device."):
        results.write_files({full: b"x"})
    assert full.is_char_device()


@pytest.mark.parametrize("name", ["", "no/such/folder/a.json", "-"])
def test_what_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot write"):
        results.check_writable(tmp_path / name)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_the_check_finds_a_folder_that_cannot_be_written(tmp_path, monkeypatch, reason):
    def fail(self, content):
        raise OSError(reason, os.strerror(reason), str(self))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputError, match=f"cannot write .*a.json: {os.strerror(reason)}"):
        results.check_writable(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_the_check_finds_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="Permission denied"):
        results.check_writable(path)


def test_two_results_of_one_path_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    for other in ("a.json", "link"):
        with pytest.raises(InputError, match=r"cannot write .*: two results would go there"):
            results.check_writable(tmp_path / "a.json", tmp_path / other)
    with pytest.raises(InputError, match="two results would go there"):
        results.check_outputs(str(tmp_path / "a.json"), tmp_path / "a.json")
    results.check_writable(Path("/dev/null"), Path("/dev/null"))
    results.check_outputs("-", tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_is_read_is_not_written_over(tmp_path):
    for json_path, plot in ((str(tmp_path / "a"), None), (None, tmp_path / "a")):
        with pytest.raises(InputError, match=r"cannot write .*a: it is read, too"):
            results.check_outputs(json_path, plot, inputs=[None, tmp_path / "a"])
    results.check_outputs(str(tmp_path / "b"), None, inputs=[tmp_path / "a"])


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_made_by_what_is_written_into_it(tmp_path, there):
    folder = tmp_path / "one" / "two"
    if there:
        folder.mkdir(parents=True)
    results.check_folder(folder, folder / "a.json")
    with pytest.raises(InputError, match="two results would go there"):
        results.check_folder(folder, folder / "a.json", folder / "a.json")
    assert folder.exists() == (tmp_path / "one").exists() == there
    results.write_files({folder / "a.json": "{}"})
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file/a: Not a directory"):
        results.check_folder(tmp_path / "file" / "a")
    with pytest.raises(InputError, match=r"--out .*file: it is a file, and a folder was expected"):
        results.check_folder(tmp_path / "file")


def test_what_cannot_be_written_after_all_is_printed(tmp_path, full_disk, capsys):
    path = tmp_path / "a.json"
    path.write_text("old")
    results.check_writable(path)
    with pytest.raises(InputError, match=r"a\.json .No space left on device.; what a\.json would hold was printed"):
        results.write_files({path: '{"found": 1}\n'})
    assert capsys.readouterr().out == '{"found": 1}\n'
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_one_file_that_fails_does_not_keep_the_others(tmp_path, capsys):
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*b\.csv .Is a directory.$"):
        results.write_files({tmp_path / "a.json": "{}", tmp_path / "b.csv": "x", tmp_path / "c.txt": "y"})
    assert ((tmp_path / "a.json").read_text(), (tmp_path / "c.txt").read_text()) == ("{}", "y")
    assert capsys.readouterr().out == ""


def test_the_view_is_shown_even_if_the_record_cannot_be_written(tmp_path, full_disk, capsys):
    with pytest.raises(InputError):
        results.deliver({"found": 1}, Text("the table"), str(tmp_path / "a.json"))
    out = capsys.readouterr().out
    assert json.loads(out.replace("the table", "")) == {"found": 1}
    assert "the table" in out


def test_json_on_stdout_moves_the_view_to_stderr(capsys):
    results.deliver({"found": 1}, Text("the table"), "-")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"found": 1}
    assert err == "the table\n"


def test_every_record_begins_alike(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stem-attn", "prefill", "--question", "Why so?"])
    record = results.new_record("prefill", {"seed": 1}, torch.device("cpu"))
    assert list(record) == ["command", "arguments", "date", "machine", "settings"]
    assert record["arguments"] == "prefill --question 'Why so?'"
    assert record["machine"]["versions"]["torch"]


def stem_attn_writing_to(file, *arguments):
    with open(file, "w") as stdout:
        code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from stem_attn import cli; cli.main()"
        environment = {**os.environ, "PYTHONPATH": SOURCE}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["bench", "--help"]])
def test_a_full_stdout_is_one_line_and_exit_code_2(arguments):
    done = stem_attn_writing_to("/dev/full", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("stem-attn: error: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_that_stops_is_no_traceback(tmp_path):
    code = "import sys; sys.argv[1:] = ['bench', '--help']; from stem_attn import cli; cli.main()"
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=120
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
