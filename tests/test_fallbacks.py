"""Counts of what ran slower than it might have."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stem_attn import fallbacks

REASON = "triton: it is Monday"


@pytest.fixture(autouse=True)
def no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallbacks, "_counts", Counter())
    monkeypatch.setattr(fallbacks, "_on_devices", {})


@pytest.mark.parametrize("first", [True, False])
def test_a_device_counts_in_every_mode(first: bool) -> None:
    """A server counts in inference mode, a script beside it without."""
    for inference in (first, not first):
        with torch.inference_mode(inference):
            fallbacks.note_on_device(REASON, torch.tensor(2))
    assert fallbacks.counts() == {REASON: 4}


def test_threads_lose_no_count() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: fallbacks.note_on_device(REASON, torch.tensor(1)), range(400)))
    assert fallbacks.counts() == {REASON: 400}


def test_what_did_not_happen_is_no_reason() -> None:
    fallbacks.note_on_device(REASON, torch.tensor(0))
    assert fallbacks.counts() == {}


def test_what_devices_counted_can_move_to_the_host() -> None:
    for _ in range(2):
        fallbacks.note_on_device(REASON, torch.tensor(2))
        fallbacks.settle()
        assert not fallbacks._on_devices
    fallbacks.note_on_device(REASON, torch.tensor(1))
    assert fallbacks.counts() == {REASON: 5}
