"""DESIGN.md's picture of the imports, held against the code."""

import ast
from pathlib import Path

import pytest

import stem_attn

ROOT = Path(stem_attn.__file__).parent

# From bottom to top; a file imports from lower layers, or from its own package.
LAYERS = [
    {"config", "plots", "cache", "fallbacks"},
    {"blocks", "checks", "workers"},
    {"scoring", "budget", "selection", "residual", "reference", "layout", "method"},
    {"call"},
    {"exact_rows"},
    {"backends", "audit"},
    {"run", "policy"},
    {"traced"},
    {"api"},
    {"methods", "warm_up", "paged"},
    {"integrations"},
    {"lab"},
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


def name_of(path):
    """A file's dotted name without the package's own; a package's `__init__.py` has its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_by_file():
    """The files that each file imports by name, wherever it does so: in a function or for type checking too."""
    names = {name_of(path): path for path in ROOT.rglob("*.py")}
    found = {}
    for own, path in names.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stem_attn":
                inside = ".".join(node.module.split(".")[1:])
                for alias in node.names:
                    full = f"{inside}.{alias.name}".lstrip(".")
                    wanted.add(full if full in names else inside)
            elif isinstance(node, ast.Import):
                wanted |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("stem_attn.")}
        found[own] = wanted - {own}
    return found


def circles(graph):
    """Sets of nodes each of which reaches all the others."""

    def reached(start):
        seen, left = set(), [start]
        while left:
            new = graph.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    reach = {node: reached(node) for node in graph}
    return {frozenset(other for other in graph if other in reach[node] and node in reach[other]) for node in graph} - {
        frozenset()
    }


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}, "g": set()}
    assert circles(graph) == {frozenset("abc"), frozenset("de")}


def test_no_files_import_one_another_in_a_circle():
    assert [sorted(circle) for circle in circles(imports_by_file())] == []


def test_experiments_do_not_import_one_another():
    experiments = {path.name for path in (ROOT / "lab").iterdir() if (path / "command.py").exists()}
    assert len(experiments) >= 7
    for own, wanted in imports_by_file().items():
        parts = own.split(".")
        if parts[0] != "lab":
            continue
        others = {name.split(".")[1] for name in wanted if name.startswith("lab.")} & experiments
        assert others <= {parts[1] if len(parts) > 1 else ""}, own
