"""Measure a stretch of model code: the time inside attention, and the memory it adds."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attn.lab.devices import synchronize

_SAMPLE_SECONDS = 0.005


def memory_method(device: torch.device) -> str:
    """Say in a few words what `PeakMemory` measures on a device."""
    if device.type == "cuda":
        return "the allocator's peak during the prefill over what it held before"
    return (
        f"the process's resident set during the prefill, sampled every {_SAMPLE_SECONDS * 1e3:g} ms, over that before"
    )


class AttentionClock:
    """Time every attention call of a model inside a `with` block.

    Wraps the function that transformers looks up for the model's attention implementation, so dense and sparse
    attention are measured at the same place: everything between q, k, v and the attention output.

    Args:
        model: A transformers model whose attention goes through the attention interface.
        on_call: Called after every attention call, for instance to move a progress bar.
    """

    def __init__(self, model: Any, on_call: Callable[[], Any]) -> None:
        self._name = model.config.get_text_config()._attn_implementation
        self._device = model.device
        self._on_call = on_call
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> AttentionClock:
        self._inner = ALL_ATTENTION_FUNCTIONS[self._name]
        ALL_ATTENTION_FUNCTIONS[self._name] = self._timed  # shadows the registered function
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        del ALL_ATTENTION_FUNCTIONS[self._name]

    @property
    def seconds(self) -> float:
        """Time inside attention so far."""
        synchronize(self._device)
        on_device_ms: float = sum(start.elapsed_time(stop) for start, stop in self._events)
        return self._seconds + on_device_ms / 1e3

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        if self._device.type == "cuda":
            # Events measure the device's time without making the host wait.
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            result = self._inner(*args, **kwargs)
            stop.record()
            self._events.append((start, stop))
        else:
            synchronize(self._device)
            begin = time.perf_counter()
            result = self._inner(*args, **kwargs)
            synchronize(self._device)
            self._seconds += time.perf_counter() - begin
        self._on_call()
        return result


class PeakMemory:
    """Measure the most memory a `with` block holds beyond what was held before it.

    On CUDA: the allocator's peak. Elsewhere: the process's resident set, sampled every 5 ms from a thread, so shorter
    peaks go unseen; freed memory is first given back to the system, or what an earlier block left would hide the
    need of this one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._thread.join()
        self.bytes = self._peak - self._before

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)
