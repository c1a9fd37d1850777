"""Every code block of the README and of the site runs. One that cannot is marked, checked in part, and listed.

The blocks of a page run one after the other, in a folder of their own. In a Python block marked `hub`, a tiny random
model stands in for the hub's. Blocks with another mark do not run: their Python is compiled and what it imports from
stem_attn is looked up, their shell is run with the programs left out, and the arguments of every `stem-attn` in it are
parsed. pytest lists them as skipped, with what they need.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from pages import MARKS, PAGES, ROOT, blocks_of, name_of

import tiny_model
from helpers import installed
from stem_attn import cli

LANGUAGES = {"python", "bash", "text", "json", "bibtex"}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CODE = [block for block in BLOCKS if block.language in ("python", "bash")]
RUN = [block for block in CODE if not block.mark or (block.language, block.mark) == ("python", "hub")]
NOT_RUN = [block for block in CODE if block not in RUN]
MODEL_TOKENS = 8192


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_what_it_is(block):
    assert block.language in LANGUAGES
    assert block.mark in ("", *MARKS)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the pages speak of, and no way to a hub."""
    (tmp_path / "long.txt").write_text("The password of the red door is 7956. " * 120)
    (tmp_path / "tuned.json").write_text('{"budget_scale": 0.5, "layer_budgets": [1.5, 0.5]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """Let `from_pretrained` and `pipeline` give a tiny random model while the block that runs is marked `hub`."""
    marks = []

    def stand_in(make):
        def from_pretrained(name, **_):
            assert marks[-1] == "hub", f"{name} comes from a hub: mark the block"
            return make()

        return from_pretrained

    def model():
        made = tiny_model.model()
        made.config.max_position_embeddings = MODEL_TOKENS
        return made

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stand_in(model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stand_in(tiny_model.tokenizer))

    def of_a_stand_in(task, name):
        assert task == "text-generation"
        return transformers.TextGenerationPipeline(stand_in(model)(name), tokenizer=tiny_model.tokenizer())

    # transformers puts another object in its own place, and under pytest `import` has given us the first one.
    monkeypatch.setattr(sys.modules["transformers"], "pipeline", of_a_stand_in)
    return marks


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}), ids=name_of)
def test_the_blocks_of_a_page_run(page, place, hub):
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for block in RUN:
        if block.page == page:
            hub.append(block.mark)
            if block.language == "python":
                # Blank lines in front, so that an error names the page's line.
                exec(compile("\n" * block.line + block.text, page, "exec"), names)
            else:
                path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
                installed(shutil.which("stem-attn", path=path) is not None, "the command stem-attn")
                shell(block, PATH=path)


def shell(block, **environment):
    done = subprocess.run(
        ["/bin/bash", "-eu", "-c", block.text],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_does_not_run_here_has_names_and_options_that_exist(block, place):
    (check_python if block.language == "python" else check_bash)(block, place)
    pytest.skip(f"{block} was checked and not run: it needs {MARKS[block.mark]}")


def check_python(block, place):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "stem_attn":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


# Bash runs the block, so that its syntax and variables are right, but no program: stem-attn's arguments are noted:
# those of a call in one line, which bash writes at once, because a block may run several calls beside one another.
NO_PROGRAMS = r"""
stem-attn() { local IFS=$'\x1f'; printf '%s\n' "$*" >> calls; }
command_not_found_handle() { return 0; }
.() { return 0; }
PATH=/nowhere
"""


def check_bash(block, place):
    (place / "no_programs").write_text(NO_PROGRAMS)
    shell(block, BASH_ENV=str(place / "no_programs"))
    calls = place / "calls"
    for call in calls.read_text().split("\n")[:-1] if calls.exists() else []:
        parse_options(call.split("\x1f") if call else [])


def parse_options(arguments):
    """Let the command line's parser read the arguments of a command, and do no work."""
    from typer.main import get_command

    command, path = get_command(cli._app()), "stem-attn"
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        path = f"{path} {arguments[0]}"
        assert arguments[0] in command.commands, f"there is no command {path}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(path, list(arguments))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_extras_that_a_page_names_exist(page):
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    named = {extra for group in re.findall(r"stem-attn\[([\w,]+)\]", page.read_text()) for extra in group.split(",")}
    assert named <= extras
