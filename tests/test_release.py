"""What a release rests on: one version everywhere, pinned actions, and models without pickles or code of their own.

That the wheel of a clean clone works is `make release-check`.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

import stem_attn
from stem_attn.lab import models
from stem_attn.lab.errors import InputError

ROOT = Path(__file__).parent.parent
SOURCE = Path(stem_attn.__file__).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_is_one():
    version = stem_attn.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    dated = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (version, str(citation["date-released"])) == dated[0]
    assert citation["version"] == version


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_rights_are_few(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("permissions", {})) <= {"id-token"}
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
    for line in path.read_text().splitlines():
        if "uses:" in line:
            assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), f"{line}: which version is that?"


def test_workflows_call_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {"docs"}
    called = {name for path in WORKFLOWS for name in re.findall(r"run: make ([\w-]+)", path.read_text())}
    assert {"test", "docs", "release-check", "wheel"} <= called <= targets


def test_every_python_that_is_promised_is_tested():
    tested = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["python"]["strategy"]["matrix"]
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert tested["python"] == promised
    assert f'requires-python = ">={promised[0]}"' in PYPROJECT


def test_the_oldest_versions_are_the_lower_bounds():
    pinned = dict(re.findall(r"^(\w+)==(\d+\.\d+)\.0$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert set(pinned) == {"torch", "transformers"}
    for package, version in pinned.items():
        assert f'"{package}>={version}' in PYPROJECT


def dotted(node):
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def unpickling(tree):
    """Names in a module that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from {name.name for name in node.names} & {
                "pickle",
                "joblib",
                "dill",
                "cloudpickle",
                "marshal",
                "shelve",
            }
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "joblib", "dill", "marshal", "shelve"):
            yield node.module
        elif isinstance(node, ast.Call) and dotted(node.func) in (
            "torch.load",
            "numpy.load",
            "np.load",
            "eval",
            "exec",
        ):
            yield dotted(node.func)
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and constant(node) is not False:
            yield node.arg


def constant(keyword):
    """The value of a keyword that is written out, None for another."""
    return keyword.value.value if isinstance(keyword.value, ast.Constant) else None


def test_unpickling_is_found():
    code = (
        "import pickle\nfrom joblib import load\ntorch.load(x)\nf(trust_remote_code=True)\nf(trust_remote_code=False)"
    )
    assert list(unpickling(ast.parse(code))) == ["pickle", "joblib", "torch.load", "trust_remote_code"]


def test_nothing_is_unpickled():
    found = {
        str(path.relative_to(SOURCE)): list(unpickling(ast.parse(path.read_text()))) for path in SOURCE.rglob("*.py")
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_weights_in_a_pickle_are_refused(tmp_path):
    import torch

    import tiny_model

    folder = Path(tiny_model.save(str(tmp_path)))
    models.load(str(folder), None, device=torch.device("cpu"), dtype=torch.float32)
    torch.save(tiny_model.model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load model"):
        models.load(str(folder), None, device=torch.device("cpu"), dtype=torch.float32)


def test_weights_that_are_cut_off_are_told(tmp_path):
    import torch

    import tiny_model

    folder = Path(tiny_model.save(str(tmp_path)))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load model"):
        models.load(str(folder), None, device=torch.device("cpu"), dtype=torch.float32)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    import json

    import torch

    import tiny_model

    folder = Path(tiny_model.save(str(tmp_path)))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load model"):
        models.load(str(folder), None, device=torch.device("cpu"), dtype=torch.float32)
