"""DESIGN.md's picture of the imports, held against the code."""

import ast
from pathlib import Path

import pytest

import stem_attn

ROOT = Path(stem_attn.__file__).parent

# From bottom to top; a file imports from lower layers, or from its own package.
LAYERS = [
    {"config"},
    {"blocks", "workers"},
    {"scoring", "budget", "selection", "checks", "residual", "reference"},
    {"backends"},
    {"attention"},
    {"api"},
    {"varlen", "paged", "methods"},
    {"baselines"},
    {"integrations"},
    {"errors"},
    {"report"},
    {"bench", "evals"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.name not in ("__init__.py", "__main__.py"))


def imported(path):
    """Modules of this package that a file imports, as dotted names without the package's own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stem_attn":
            inner = node.module.split(".")[1:]
            yield from [inner] if inner else [[alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("stem_attn.")]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    own = path.relative_to(ROOT).with_suffix("").parts
    for parts in imported(path):
        if parts[0] == own[0]:
            continue
        if parts[0] in LEVEL:
            assert LEVEL[parts[0]] < LEVEL[own[0]], f"{'.'.join(own)} imports {'.'.join(parts)}"


def test_backends_do_not_import_one_another():
    for path in (ROOT / "backends").rglob("*.py"):
        own = path.relative_to(ROOT / "backends").with_suffix("").parts[0]
        others = {parts[1] for parts in imported(path) if parts[0] == "backends" and len(parts) > 1}
        assert others <= {own, "base"}, path


def test_the_reference_shares_only_config_and_blocks():
    assert {parts[0] for parts in imported(ROOT / "reference.py")} == {"config", "blocks"}
