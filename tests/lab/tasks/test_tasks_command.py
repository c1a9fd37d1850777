"""The commands `eval tasks`, `eval ruler` and `eval report`."""

import json
from io import StringIO

import pytest
from rich.console import Console

import tiny_model
from stem_attn import cli
from stem_attn.lab.tasks.report import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def command(folder, *arguments, name="ruler"):
    return cli.run(["eval", name, "--model", folder, "--device", "cpu", "--block-size", "16", *arguments])


def shown(found):
    with StringIO() as file:
        Console(file=file, width=250).print(render(found))
        return file.getvalue()


def test_the_command_writes_tables_and_json(folder, tmp_path, capsys):
    record, out = tmp_path / "ruler.json", tmp_path / "answers.jsonl"
    code = command(
        folder, "--tasks", "niah_single_1,fwe", "--lengths", "1536", "--samples", "2", "--methods", "stem-default",
        "--variant", "mine=stem-default,min_seq_len=0,budget_bias=8", "--out", str(out), "--json", str(record),
    )  # fmt: skip
    assert code == 0
    text = capsys.readouterr().out
    for part in ("RULER (2)", "niah_single_1", "mine", "budget", "stem-default at 1536: layers"):
        assert part in text
    found = json.loads(record.read_text())
    assert [cell["samples"] for cell in found["cells"]] == [2] * 6
    assert [row["method"] for row in found["means"]] == ["dense", "stem-default", "mine"]
    assert [row["budget"] == 1 for row in found["means"]] == [True, True, False]  # too short for the default
    assert found["means"][1]["agreement"]["mean"] == 100
    assert found["settings"]["methods"][2]["fields"] == {"min_seq_len": 0, "budget_bias": 8}
    assert found["means"][2]["minus_dense"]["interval"] is not None
    assert found["chat"] is False
    assert found["tasks"] == {"niah_single_1": [], "fwe": []}
    assert len(out.read_text().splitlines()) == 12


def test_processes_share_the_work_and_the_report_joins_them(folder, tmp_path, capsys):
    common = (
        "--tasks",
        "key_values,code_file",
        "--lengths",
        "1536",
        "--samples",
        "3",
        "--methods",
        "xattention+tail",
    )
    parts = [tmp_path / f"part{i}.jsonl" for i in (1, 2)]
    for i, file in enumerate(parts, start=1):
        assert command(folder, *common, "--part", f"{i}/2", "--out", str(file), name="tasks") == 0
    assert [len(file.read_text().splitlines()) for file in parts] == [8, 4]
    joined, whole = tmp_path / "joined.json", tmp_path / "whole.json"
    assert cli.run(["eval", "report", *map(str, parts), "--json", str(joined)]) == 0
    assert command(folder, *common, "--json", str(whole), name="tasks") == 0
    found, expected = (json.loads(file.read_text()) for file in (joined, whole))
    assert found["cells"] == expected["cells"]
    assert found["means"] == expected["means"]
    dense, tail = found["settings"]["methods"]
    assert dense == {"name": "dense", "base": "dense", "fields": {}}
    assert (tail["name"], tail["base"]) == ("xattention+tail", "xattention")
    assert tail["fields"]["method"]["block_size"] == 16
    # A random model masters nothing, so that nothing is averaged.
    assert [left["task"] for left in found["not_in_means"]] == ["key_values", "code_file"]
    text = shown(found)
    assert "key_values at 1536: in no mean, since dense attention itself has 0.0." in text
    assert "code_file: made of the source of numpy" in text
    capsys.readouterr()

    assert cli.run(["eval", "report", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: No such file" in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert cli.run(["eval", "report", str(empty)]) == 2
    assert "hold no answers" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    assert command(folder, *common[:-3], "1", "--seed", "7", "--out", str(other), name="tasks") == 0
    assert cli.run(["eval", "report", str(parts[0]), str(other)]) == 2
    assert "answers of more than one seed: 42, 7" in capsys.readouterr().err
    changed = tmp_path / "changed.jsonl"
    lines = [json.loads(line) for line in parts[1].read_text().splitlines()]
    tails = [{**line, "prompt_sha256": "0" * 64} for line in lines if line["name"] != "dense"]
    changed.write_text("".join(json.dumps(line) + "\n" for line in tails))
    assert cli.run(["eval", "report", *map(str, parts), str(changed)]) == 2
    assert "different prompts of key_values at 1536 tokens, sample 1" in capsys.readouterr().err


def test_the_report_tells_densities_apart_and_refuses_other_settings_under_one_name(folder, tmp_path, capsys):
    common = ("--tasks", "fwe", "--lengths", "1536", "--samples", "1", "--methods", "xattention+tail")
    files = [tmp_path / f"{name}.jsonl" for name in ("own", "half", "larger")]
    for file, more in zip(files, ([], ["--density", "0.5"], ["--block-size", "32"]), strict=True):
        assert command(folder, *common, *more, "--out", str(file), name="tasks") == 0
    record = tmp_path / "report.json"
    plot = tmp_path / "report.png"
    assert cli.run(["eval", "report", *map(str, files[:2]), "--json", str(record), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(record.read_text())
    names = ["dense", "xattention+tail with its own budget", "xattention+tail at 0.5"]
    assert [cell["method"] for cell in found["cells"]] == names
    assert found["cells"][2]["budget"] == pytest.approx(0.5, abs=0.01)
    capsys.readouterr()
    assert cli.run(["eval", "report", str(files[0]), str(files[2])]) == 2
    assert "two methods called xattention+tail" in capsys.readouterr().err


def test_a_density_leaves_depth_decay_out_and_the_tables_say_so(folder, capsys):
    methods = ("--methods", "stem-default,stem-default-0.1", "--density", "0.5")
    assert command(folder, "--tasks", "fwe", "--lengths", "1536", "--samples", "1", *methods) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "stem-default: brought to one density in every layer, so without the depth_decay that it has" in text
    assert "stem-default-0.1: brought" not in text  # has none


def test_no_result_is_written_over_another_or_over_what_is_read(folder, tmp_path, capsys):
    answers, file = tmp_path / "answers.jsonl", tmp_path / "one.png"
    answers.write_text("kept")
    for options, said in (
        (["report", str(answers), "--json", str(file), "--plot", str(file)], "two results would go there"),
        (["report", str(answers), "--json", str(answers)], "it is read, too"),
        (["report", str(answers), "--plot", str(answers)], "it is read, too"),
    ):
        assert cli.run(["eval", *options]) == 2
        assert said in capsys.readouterr().err
    assert command(folder, "--tasks", "fwe", "--out", str(answers), "--json", str(answers), name="tasks") == 2
    assert "it is read, too" in capsys.readouterr().err
    assert (answers.read_text(), file.exists()) == ("kept", False)


def test_a_run_without_time_begins_nothing(folder, capsys):
    assert command(folder, "--tasks", "fwe", "--lengths", "1536", "--minutes", "0") == 2
    assert "no prompt was answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "niah"], "unknown task 'niah'; known: exact, ruler, retrieval, code, all, niah_single_1"),
        (["--tasks", "qa_1"], "task qa_1 is not offered"),
        (["--tasks", ","], "--tasks names no task"),
        (["--lengths", "4K"], "--lengths takes positive whole numbers"),
        (["--lengths", "0"], "--lengths takes positive whole numbers"),
        (["--lengths", "4096"], "--lengths 4096 is more than the model's context of 2048"),
        (["--template", "llama"], "--template must be one of auto, base, chat"),
        (["--template", "chat", "--lengths", "1024"], "has no chat template"),
        (["--methods", ","], "nothing to measure"),
        (["--methods", "dense,flash"], "unknown method 'flash'"),
        (["--methods", "dense+tail"], "dense attention keeps everything"),
        (["--variant", "a=stem-default,strides=3"], "unknown setting strides"),
        (["--lengths", "200"], "does not fit"),
        (["--tasks", "code", "--lengths", "70"], "code_file does not fit 70 tokens"),
        (["--part", "3/2"], "--part takes I/N with I from 1 to N"),
        (["--part", "2"], "--part takes I/N with I from 1 to N"),
        (["--out", "/nowhere/answers.jsonl"], "cannot use /nowhere/answers.jsonl for --out"),
        (["--json", "/nowhere/ruler.json"], "cannot write /nowhere/ruler.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, capsys, arguments, message):
    assert command(folder, *arguments) == 2
    assert message in capsys.readouterr().err
