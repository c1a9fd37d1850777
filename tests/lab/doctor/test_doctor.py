"""`stem-attn doctor`: verdicts and exit codes, reasons, and that nothing says who its user is."""

import dataclasses
import getpass
import json
import sys
from types import ModuleType

import pytest
import torch

from stem_attn import backends, cli
from stem_attn.backends.base import Backend
from stem_attn.backends.cpu import CpuBackend, native
from stem_attn.lab.devices import DTYPES
from stem_attn.lab.doctor import run
from stem_attn.lab.doctor.private import without_private_parts

ENVELOPE = ["command", "arguments", "date", "machine", "settings", "backends", "integrations"]


@pytest.fixture
def quick(monkeypatch):
    """One backend, one dtype, no model."""
    monkeypatch.setattr(run, "DTYPES", {"float32": torch.float32})
    monkeypatch.setattr(backends, "available", lambda: {"cpu": None, "fa4": "no GPU"})
    monkeypatch.setattr(run, "examine_integrations", list)


def record(tmp_path, *, code):
    path = tmp_path / "doctor.json"
    assert cli.run(["doctor", "--json", str(path)]) == code
    return json.loads(path.read_text())


def test_all_that_is_available_is_right(tmp_path, capsys):
    before = torch.get_rng_state()
    found = record(tmp_path, code=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(found) == ENVELOPE
    assert {"stem-attn", "torch", "transformers"} <= set(found["machine"]["versions"])
    assert [part["name"] for part in found["backends"]] == list(backends.names())
    parts = {part["name"]: part for part in (*found["backends"], *found["integrations"])}
    assert [check["dtype"] for check in parts["cpu"]["checks"]] == list(DTYPES)
    for check in (*parts["cpu"]["checks"], *parts["transformers"]["checks"]):
        assert check["wrong"] is None
        assert 0 <= check["error"] <= check["allowed"]
        assert 0.1 < check["density"] < 0.7
    for name, reason in backends.available().items():
        assert (parts[name]["why_not"] is None) == (reason is None)
    shown = capsys.readouterr().out
    assert "All that is available here is right." in shown
    assert "fa4 is not available here: the package flash-attn-4 is not installed" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_json_on_stdout(quick, capsys):
    assert cli.run(["doctor", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)) == ENVELOPE
    assert "All that is available here is right." in err


@pytest.mark.parametrize(
    ("switch", "said"), [("0", "in plain torch, which is slower: STEM_ATTN_NATIVE=0"), ("1", "a kernel")]
)
def test_says_how_the_cpu_backend_computes(switch, said, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(native.SWITCH, switch)
    monkeypatch.setattr(native, "_kernel", lambda: (None, "not used") if switch == "0" else (object(), None))
    monkeypatch.setattr(native, "takes", lambda q: False)
    assert record(tmp_path, code=0)["backends"][0]["how"].startswith(said)
    assert f"cpu runs {said}" in " ".join(capsys.readouterr().out.split())


def shifted(monkeypatch):
    original = CpuBackend.attend_part

    def attend_part(self, call, q, k, v, selection, out, lse):
        original(self, call, q, k, v, selection, out, lse)
        out[:, 1, -1] += 1e-4  # a head, a token

    monkeypatch.setattr(CpuBackend, "attend_part", attend_part)


def broken(monkeypatch):
    def attend_part(*args):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(CpuBackend, "attend_part", attend_part)


def another_choice(monkeypatch):
    original = Backend.select

    def select(self, call, part, config, budget):
        return original(self, call, part, dataclasses.replace(config, value_term="none", spread_weight=2.0), budget)

    monkeypatch.setattr(CpuBackend, "select", select)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shifted, "against float64; torch's own"),
        (broken, "RuntimeError: no kernel image is available"),
        (another_choice, "differ by more than rounding"),
    ],
)
def test_what_is_wrong_is_said_and_is_exit_code_1(spoil, said, quick, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch)
    found = record(tmp_path, code=1)
    assert said in found["backends"][0]["checks"][0]["wrong"]
    shown = capsys.readouterr().out
    assert "Something that is available here is wrong." in shown
    assert "WRONG" in shown


def test_an_adapter_that_changes_the_logits_is_wrong(monkeypatch):
    assert run._check_model()["wrong"] is None
    broken(monkeypatch)
    assert run._check_model()["wrong"] == "RuntimeError: no kernel image is available"
    monkeypatch.undo()

    def attend_part(self, call, q, k, v, selection, out, lse):
        out.zero_()

    monkeypatch.setattr(CpuBackend, "attend_part", attend_part)
    assert run._check_model()["wrong"].startswith("with every block kept the logits differ from dense by")


def test_a_bad_folder_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(run, "examine_backends", lambda: pytest.fail("it began"))
    assert cli.run(["doctor", "--json", "/no/such/folder/x.json"]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    found = run.examine_integrations()
    assert [part["name"] for part in found] == ["transformers", "vllm"]
    for part in found:
        assert part["why_not"].startswith(f"the package {part['name']} is not installed (pip install")
        assert part["checks"] == []


def test_an_installation_that_is_broken(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "stem_attn.integrations.hf", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "stem_attn.integrations.vllm.compat", raising=False)
    reasons = [part["why_not"] for part in run.examine_integrations()]
    assert all(reason.startswith(("ModuleNotFoundError", "ImportError")) for reason in reasons)


@pytest.mark.parametrize(
    ("lacks", "names", "plugins", "said"),
    [
        (["a.b is gone", "c is gone"], ["stem"], None, "does not know this vLLM, 0.32.0: a.b is gone; c is gone"),
        ([], [], None, "plugin is not registered"),
        ([], ["stem"], "other", "VLLM_PLUGINS is set, and stem is not in it"),
        ([], ["stem"], "other,stem", None),
        ([], ["other", "stem"], None, None),
    ],
)
def test_vllm(lacks, names, plugins, said, monkeypatch, tmp_path):
    package, version = ModuleType("vllm"), ModuleType("vllm.version")
    package.__path__, version.__version__ = [str(tmp_path / "vllm")], "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.version", version)
    monkeypatch.setattr("stem_attn.integrations.vllm.interface.missing", lambda offer, parts: lacks)
    monkeypatch.delitem(sys.modules, "stem_attn.integrations.vllm.compat", raising=False)
    monkeypatch.delattr("stem_attn.integrations.vllm.compat", raising=False)
    monkeypatch.setattr(run, "find_spec", lambda name: object())
    monkeypatch.setattr(run, "entry_points", lambda group: [type("Point", (), {"name": name}) for name in names])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    reason = run._why_no_vllm()
    assert reason is None if said is None else said in reason


# --- what it must not say --------------------------------------------------------------------------------------------


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user with a name, a home with a space in it, and a project whose name is her secret."""
    home, project = tmp_path / "Zofia K" / "home", tmp_path / "Zofia K" / "home" / "secret-project"
    project.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "zofiak")
    monkeypatch.chdir(project)
    assert getpass.getuser() == "zofiak"
    return home, project


def test_no_path_and_no_name_is_in_the_output(user, quick, monkeypatch, capsys):
    home, project = user
    reasons = {
        "triton": f"cannot import name 'x' from 'triton' ({home}/.venv/site-packages/triton/__init__.py)",
        "fa4": f"libcuda.so.1: cannot open {project}/lib/libcuda.so.1, zofiak lacks rights to /mnt/zofiak-data/x y",
        "cpu": None,
    }
    monkeypatch.setattr(backends, "available", lambda: reasons)
    monkeypatch.setattr(sys, "argv", ["stem-attn", "doctor", "--json", str(project / "out.json")])

    def attend_part(*args):
        raise OSError(f"{project / 'cache'}/k.cubin is gone; see C:\\Users\\zofiak\\log and ~/notes")

    monkeypatch.setattr(CpuBackend, "attend_part", attend_part)
    assert cli.run(["doctor", "--json", str(project / "out.json")]) == 1
    out, err = capsys.readouterr()
    said = out + err + (project / "out.json").read_text()
    for private in (str(home), str(project), "Zofia", "zofiak", "secret-project", "/mnt", "notes", "Users"):
        assert private not in said
    assert "triton/__init__.py" in said
    assert "libcuda.so.1" in said


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-26 15:42:04+0000",
        "Linux-x86_64-glibc-2.36",
        "the package flash-attn-4 is not installed (pip install stem-attn[fa4])",
        "it needs a Hopper GPU (compute capability 9.0), got [(8, 0)]",
        "error max 1.00e-04, rms 5.0e-05 against float64; allowed 1.0e-06, 6.7e-07",
        "AMD EPYC 9B14 w/o SMT",
    ],
)
def test_other_texts_stay(text):
    assert without_private_parts({"a": [text, 1, None]}) == {"a": [text, 1, None]}
