"""What holds for every command that measures: its record, a full disk, stdin, and what its messages name."""

import ast
import errno
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stem_attn
import tiny_model
from stem_attn import cli
from stem_attn.lab.bench import limit
from stem_attn.lab.doctor import run as doctor
from stem_attn.lab.shapes import MODELS, SHAPES, Shape

SOURCE = Path(stem_attn.__file__).parent
ENVELOPE = ["command", "arguments", "date", "machine", "settings"]
SMALL = ["--set", "block_size=16", "--set", "min_seq_len=0", "--set", "budget_ratio=0.1"]
MODEL = ["--model", "{model}", "--device", "cpu"]
BENCH = ["bench", "--device", "cpu", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--methods", "sdpa,cpu"]
BENCH += ["--lengths", "300", "--repeats", "1", *SMALL]
TTFT = ["bench", "--ttft", "--shape", "smollm2", "--device", "cpu", "--lengths", "300", "--repeats", "1", *SMALL]
# The command, and the option that names a result file or a folder of them.
COMMANDS = {
    "doctor": (["doctor"], "--json"),
    "prefill": (["prefill", *MODEL, "--max-tokens", "400", "--new-tokens", "1", *SMALL], "--json"),
    "bench": (BENCH, "--json"),
    "bench to a folder": (BENCH, "--out"),
    "ttft": (TTFT, "--json"),
    "density": (
        ["density", "--lengths", "8192", "--densities", "0.3", "--presets", "official", "--rounds", "1"],
        "--out",
    ),
    "tune": (["tune", *MODEL, "--length", "256", "--prompts", "1", "--held-out", "0", *SMALL], "--out"),
    "inspect": (
        ["inspect", *MODEL, "--max-tokens", "400", "--block-size", "16",
         "--variant", "small=stem-default,min_seq_len=0"],
        "--out",
    ),
    "fidelity": (
        ["eval", "fidelity", *MODEL, "--length", "512", "--block-size", "16", "--prompts", "1", "--densities", "0.6",
         "--methods", "stem-official"], "--out",
    ),
    "audit": (
        ["eval", "audit", *MODEL, "--length", "400", "--prompts", "1", "--draws", "2", "--rounds", "1", *SMALL],
        "--json",
    ),
    "ruler": (
        ["eval", "ruler", *MODEL, "--tasks", "fwe", "--lengths", "1536", "--samples", "1", "--methods", "dense"],
        "--json",
    ),
    "tasks": (
        ["eval", "tasks", *MODEL, "--tasks", "key_values", "--lengths", "1536", "--samples", "1",
         "--methods", "a_shape"],
        "--json",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def arguments(request, folder, tmp_path, monkeypatch):
    """A command on tiny tensors that writes below `tmp_path`."""
    monkeypatch.setattr(limit, "_SIZE", {"cuda": 64, "cpu": 64})
    monkeypatch.setattr(doctor, "DTYPES", {"float32": torch.float32})
    monkeypatch.setitem(SHAPES, "llama3-8b", Shape(2, 1, 16))
    tiny = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 101, "num_hidden_layers": 1}
    monkeypatch.setitem(MODELS, "smollm2", MODELS["smollm2"] | tiny | {"num_attention_heads": 2})
    monkeypatch.setitem(MODELS["smollm2"], "num_key_value_heads", 1)
    command, option = COMMANDS[request.param]
    name = "out" if option == "--out" and request.param != "tune" else "out.json"
    return [argument.replace("{model}", folder) for argument in command] + [option, str(tmp_path / name)]


every_command = pytest.mark.parametrize("arguments", COMMANDS, indirect=True)


FP8 = {
    "prefill": ["--set", "precision=fp8"],
    "ttft": ["--set", "precision=fp8"],
    "tune": ["--set", "precision=fp8"],
    "audit": ["--set", "precision=fp8"],
    "inspect": ["--variant", "eight=stem-default,min_seq_len=0,precision=fp8"],
    "fidelity": ["--variant", "eight=stem-default,precision=fp8"],
    "tasks": ["--variant", "eight=stem-default,precision=fp8"],
    "ruler": ["--variant", "eight=stem-default,precision=fp8"],
}


@pytest.mark.parametrize(("arguments", "asked"), FP8.items(), indirect=["arguments"], ids=list(FP8))
def test_a_precision_that_no_kernel_has_is_refused_before_any_work(arguments, asked, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a model runs"))
    assert cli.run([*arguments, *asked]) == 2
    assert "no backend can run this call with precision='fp8': cpu: it multiplies in" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [name for name in COMMANDS if name != "doctor"], indirect=True)
def test_a_device_that_is_not_here_is_refused_before_any_work(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a model runs"))
    assert cli.run([*arguments, "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("stem-attn: error: cannot use device 'cuda:99': ")


@every_command
def test_a_disk_that_fills_up_loses_no_number(arguments, tmp_path, monkeypatch, capsys):
    write = Path.write_bytes

    def fail(self, content):
        if self.name.endswith(".part") and any(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert error.startswith("stem-attn: error: cannot write ")
    assert "No space left on device" in error
    assert "was printed" in error
    record, _ = json.JSONDecoder().raw_decode(out[out.index("{") :])
    assert list(record)[:5] == ENVELOPE
    assert record["command"] in (arguments[:2] if arguments[0] == "eval" else arguments[:1])
    assert record["machine"]["cpu"]
    assert len(record) > 5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@every_command
def test_a_disk_that_is_full_is_found_before_the_work(arguments, tmp_path, monkeypatch, capsys):
    def fail(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    def work(*args, **kwargs):
        raise AssertionError("it began")

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr("stem_attn.lab.models.load", work)
    monkeypatch.setattr("stem_attn.lab.bench.ttft.build_model", work)
    monkeypatch.setattr("stem_attn.lab.bench.run.run_case", work)
    monkeypatch.setattr("stem_attn.lab.density.run.time_presets", work)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stem-attn: error: cannot write ")
    assert err.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("arguments", ["prefill", "bench", "ttft", "audit", "ruler"], indirect=True)
def test_json_on_stdout_is_the_record_alone(arguments, capsys):
    assert cli.run([*arguments[:-1], "-"]) == 0
    assert list(json.loads(capsys.readouterr().out))[:5] == ENVELOPE


def test_answers_that_cannot_be_kept_are_printed(folder, tmp_path, monkeypatch, capsys):
    store = tmp_path / "answers.jsonl"
    opened = Path.open

    def fail(self, mode="r", *args, **kwargs):
        if self == store and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    command = [argument.replace("{model}", folder) for argument in COMMANDS["ruler"][0]]
    assert cli.run([*command, "--out", str(store)]) == 2
    out, err = capsys.readouterr()
    assert "answers.jsonl: No space left on device; the last 1 answers were printed" in err.splitlines()[-1]
    assert json.loads(out.splitlines()[0])["key"]["task"] == "fwe"


# --- texts and settings on stdin -------------------------------------------------------------------------------------


def run_with_stdin(arguments, content, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    return cli.run([text.replace("{model}", folder).replace("{tmp}", str(tmp_path)) for text in arguments])


TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40
FROM_STDIN = {
    "inspect": [*COMMANDS["inspect"][0], "--out", "{tmp}", "--prompt-file", "-", "--max-tokens", "1900"],
    "prefill": ["prefill", *MODEL, "--new-tokens", "1", "--json", "{tmp}/out.json", *SMALL, "--prompt-file", "-"],
    "tune": [*COMMANDS["tune"][0], "--out", "{tmp}/out.json", "--text-file", "-"],
    "fidelity": [*COMMANDS["fidelity"][0], "--out", "{tmp}", "--text-file", "-"],
}


@pytest.mark.parametrize("name", FROM_STDIN)
def test_a_text_is_read_from_stdin(name, folder, tmp_path, monkeypatch):
    assert run_with_stdin(FROM_STDIN[name], TEXT.encode(), folder, tmp_path, monkeypatch) == 0
    written = {"prefill": "out.json", "tune": "out.tune.json", "fidelity": "fidelity.json", "inspect": "inspect.json"}[
        name
    ]
    found = json.loads((tmp_path / written).read_text())
    text = found["prompt"] if name in ("prefill", "inspect") else found["texts"][0]
    assert text["source"] == "stdin"
    if name == "prefill":
        assert text["tokens"] == len(TEXT) + 1


@pytest.mark.parametrize(("content", "said"), [(b" \n", "stdin is empty"), (b"d\xe9j\xe0", "stdin is not UTF-8 text")])
@pytest.mark.parametrize("name", FROM_STDIN)
def test_a_bad_text_on_stdin_is_one_line(name, content, said, folder, tmp_path, monkeypatch, capsys):
    assert run_with_stdin(FROM_STDIN[name], content, folder, tmp_path, monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"stem-attn: error: {said}")


SETTINGS = {"decay": 0.5, "min_seq_len": 0}
CONFIG_FROM_STDIN = {
    "prefill": [*COMMANDS["prefill"][0], "--config", "-", "--json", "{tmp}/out.json"],
    "bench": [*BENCH, "--config", "-", "--json", "{tmp}/out.json"],
    "tune": [*COMMANDS["tune"][0], "--config", "-", "--out", "{tmp}/tuned.json"],
    "inspect": [*COMMANDS["inspect"][0][:-1], "small=config:-,budget_ratio=0.1", "--out", "{tmp}"],
}


@pytest.mark.parametrize("name", CONFIG_FROM_STDIN)
def test_settings_are_read_from_stdin(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(limit, "_SIZE", {"cuda": 64, "cpu": 64})
    content = json.dumps(SETTINGS).encode()
    assert run_with_stdin(CONFIG_FROM_STDIN[name], content, folder, tmp_path, monkeypatch) == 0
    written = {"tune": "tuned.tune.json", "inspect": "inspect.json"}.get(name, "out.json")
    settings = json.loads((tmp_path / written).read_text())["settings"]
    used = settings["methods"]["small"] if name == "inspect" else settings["config"]
    assert used["decay"] == 0.5


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (b"", [], "stdin is empty"),
        (b"[1]", [], "stdin must be a JSON object, got list"),
        (b'{"decay": 7}', [], "stdin: decay must be"),
        (b"{}", ["--prompt-file", "-"], "stdin is empty, or another option has read it"),
    ],
)
def test_bad_settings_on_stdin_are_one_line(content, more, said, folder, tmp_path, monkeypatch, capsys):
    assert run_with_stdin([*CONFIG_FROM_STDIN["prefill"], *more], content, folder, tmp_path, monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"stem-attn: error: {said}")
    assert list(tmp_path.iterdir()) == []


# --- presets and extras ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (command, _) in COMMANDS.items() if "--set" in command])
def test_an_unknown_preset_is_told_the_known_ones_of_this_command(name, folder, capsys):
    command, _ = COMMANDS[name]
    given = [argument.replace("{model}", folder) for argument in command]
    target = ["--out", "x.json"] if name == "tune" else []
    assert cli.run([*given, *target, "--preset", "fast"]) == 2
    message = capsys.readouterr().err
    words = 2 if command[0] == "eval" else 1
    assert cli.run([*command[:words], "--help"]) == 0
    described = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
    known = message.split("known: ")[1].strip().split(", ")
    assert known == (["demo"] if name == "prefill" else []) + ["default", "default-0.1", "official", "paper"]
    for preset in known:
        assert preset in described


def extras():
    """The import names that each extra of this distribution installs, by what pyproject.toml says."""
    text = (SOURCE.parent.parent / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    listed = {}
    for name, body in re.findall(r"^(\w+) = \[(.*?)\]\s*(?:#[^\n]*)?$", section, re.MULTILINE | re.DOTALL):
        listed[name] = re.findall(r'"([\w-]+)(?:\[([\w,-]+)\])?', body)

    def closure(name):
        for package, inner in listed[name]:
            if package == "stem-attn":
                for extra in inner.split(","):
                    yield from closure(extra)
            else:
                yield package.replace("-", "_")

    return {name: set(closure(name)) for name in listed}


def required():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                extra = next(keyword.value.value for keyword in node.keywords if keyword.arg == "extra")
                yield pytest.param({one.value for one in node.args}, extra, id=f"{path.relative_to(SOURCE)}: {extra}")


@pytest.mark.parametrize(("packages", "extra"), list(required()))
def test_the_extra_that_a_message_names_installs_what_is_missing(packages, extra):
    assert packages <= extras()[extra]
    assert extra != "dev"  # for this project's own tests


def test_every_extra_that_is_named_anywhere_exists():
    named = {
        extra
        for path in SOURCE.rglob("*.py")
        for group in re.findall(r"stem-attn\[([\w,]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert named <= set(extras()) - {"dev"}
