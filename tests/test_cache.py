import os
from pathlib import Path

import pytest

from stem_attn import cache


@pytest.mark.skipif(os.name == "nt", reason="XDG is for Unix")
def test_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "stem-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "stem-attn"
    monkeypatch.setenv(cache.CACHE_VARIABLE, "/elsewhere")
    assert cache.cache_folder() == Path("/elsewhere")
