"""Each example runs as a user runs it, on a tiny random model, and prints what it is about."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTS = {
    "generate.py": "sparse=",
    "chunked_prefill.py": "largest difference of the logits",
    "own_method.py": "of the blocks kept",
    "compare_methods.py": "xattention",
    "tune_and_use.py": "budgets by layer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def run(name, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTS, "serve_and_ask.py"}


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs(name, folder):
    takes_a_model = "[MODEL]" in (EXAMPLES / name).read_text()
    done = run(name, *([folder] if takes_a_model else []))
    assert done.returncode == 0, done.stderr
    assert PRINTS[name] in done.stdout


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: tests/serving runs the example")
def test_the_server_example_says_that_vllm_is_missing():
    done = run("serve_and_ask.py")
    assert done.returncode == 1
    assert "needs vLLM" in done.stderr
