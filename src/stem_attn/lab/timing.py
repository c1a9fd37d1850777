"""Timing: all that is timed takes turns in every round, so that drift of the clocks meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stem_attn.lab.devices import synchronize

Work = Callable[[], Any]
"""Something to time."""

# Written before every timed call on a GPU: far more than any L2 holds, and long enough (about 0.2 ms) for the host
# to queue the call before the device reaches it, so that the events see device time.
_FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one piece of work, one number a round.

    Args:
        samples: Time on the device.
        host: Time until the call returned, on a GPU: what it keeps the host busy for. Empty on a CPU.
    """

    samples: tuple[float, ...]
    host: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """Fastest round."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """Slowest round."""
        return max(self.samples)

    def describe(self) -> dict[str, float]:
        """Return median, fastest and slowest round as plain values."""
        return {"median": self.median, "min": self.low, "max": self.high}


@dataclass(frozen=True, slots=True)
class Health:
    """The GPU's state while a round was running."""

    sm_clock_mhz: int
    temperature_c: int
    power_w: float


def first_call(run: Work, device: torch.device) -> tuple[Any, float]:
    """Run once; return the output and the wall-clock seconds, compilation included."""
    start = time.perf_counter()
    out = run()
    synchronize(device)
    return out, time.perf_counter() - start


def peak_extra_mib(run: Work, device: torch.device) -> float | None:
    """Run once; return the most device memory held beyond what was held before, output included. None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def time_rounds(
    runs: list[Work], device: torch.device, rounds: int, *, on_round: Callable[[int], None] | None = None
) -> tuple[list[Times], list[Health]]:
    """Time every callable once a round, starting each round with the next one.

    Args:
        runs: What to time; each has run before.
        device: Where they run. On CUDA: device time between events, the L2 cache flushed before each call.
        rounds: Measurements of each.
        on_round: Told the number of the round that starts, from 1.

    Returns:
        The times in the order of `runs`, and the GPU's state in every round (empty where it cannot be read).
    """
    one_round = _cuda_round if device.type == "cuda" else _cpu_round
    samples: list[list[tuple[float, ...]]] = [[] for _ in runs]
    states: list[Health] = []
    for r in range(rounds):
        if on_round is not None:
            on_round(r + 1)
        order = [(r + i) % len(runs) for i in range(len(runs))]
        times, state = one_round([runs[i] for i in order], device)
        for i, measured in zip(order, times, strict=True):
            samples[i].append(measured)
        if state:
            states.append(state)
    return [Times(*zip(*s, strict=True)) for s in samples], states


def _cpu_round(runs: list[Work], device: torch.device) -> tuple[list[tuple[float, ...]], Health | None]:
    times: list[tuple[float, ...]] = []
    for run in runs:
        start = time.perf_counter()
        run()
        times.append(((time.perf_counter() - start) * 1e3,))
    return times, None


def _cuda_round(runs: list[Work], device: torch.device) -> tuple[list[tuple[float, ...]], Health | None]:
    host = []
    with torch.cuda.device(device):
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        events = [(_event(), _event()) for _ in runs]
        for run, (start, stop) in zip(runs, events, strict=True):
            flush.zero_()
            start.record()
            called = time.perf_counter()
            run()
            host.append((time.perf_counter() - called) * 1e3)
            stop.record()
        state = _health(device)  # read while the device works through the queue: an idle GPU lowers its clocks
        torch.cuda.synchronize()
        device_ms = [start.elapsed_time(stop) for start, stop in events]
        return list(zip(device_ms, host, strict=True)), state


def _health(device: torch.device) -> Health | None:
    try:
        return Health(
            torch.cuda.clock_rate(device), torch.cuda.temperature(device), torch.cuda.power_draw(device) / 1e3
        )
    except Exception:  # no nvidia-ml-py, or the driver does not answer: the times stand without it
        return None


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
