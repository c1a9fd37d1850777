"""Every error and warning of the plugin stands on the serving page, by its words."""

import ast
import re
from pathlib import Path

import pytest

import stem_attn

FOLDER = Path(stem_attn.__file__).parent / "integrations" / "vllm"
PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
LOGS = {"warning", "warning_once", "info", "info_once", "error"}


def literals(node):
    """The parts of a message that are the same whenever it is given."""
    if isinstance(node, ast.Constant):
        return re.split(r"%[.\d]*\w", str(node.value))
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    return []


def messages():
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            logged = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGS
            if (logged or isinstance(node, ast.Raise)) and isinstance(call, ast.Call) and call.args:
                yield pytest.param(max(literals(call.args[0]), key=len), id=f"{path.name}:{node.lineno}")


@pytest.mark.parametrize("words", messages())
def test_the_page_has_the_message(words):
    page = " ".join(PAGE.read_text().replace("`", "").split())
    assert len(words) >= 15
    assert " ".join(words.split()) in page
