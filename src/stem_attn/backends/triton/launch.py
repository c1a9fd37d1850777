"""Launch a kernel again and again with everything but its tensors fixed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

log = logging.getLogger("stem_attn")


class Launch:
    """A kernel with its grid, numbers and constants.

    Triton's own launch binds and inspects every argument each time, which takes tens of microseconds. After the
    first call this goes straight to the compiled kernel, so all calls must pass tensors of the same dtypes and, to
    16 bytes, the same alignment.

    Args:
        kernel: A `triton.jit` or `gluon.jit` function whose parameters are tensors, then numbers, then constants. A
            number that it does not specialise on may stand last among the tensors, and change from call to call.
        grid: Programs along two or three axes.
        numbers: The values of the parameters between tensors and constants, in order.
        constants: The constant parameters by name.
        options: Warps, stages and what else Triton takes.
    """

    __slots__ = ("_arguments", "_grid", "_kernel", "_named", "_numbers", "_run")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], constants: dict[str, Any], **options: int
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, (*grid, 1)[:3], numbers
        self._named = {**constants, **options}
        self._arguments = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._run: Any = None

    def __call__(self, *tensors: Any, stream: int | None = None) -> None:
        """Run on the current device and stream.

        Args:
            tensors: The kernel's first arguments.
            stream: The current stream, from `stream_of`, where it is known; None: it is looked up.
        """
        if self._run is None:
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._named)
            if compiled is not None:  # the interpreter compiles nothing
                self._run = compiled[self._grid]
        else:
            self._run(*tensors, *self._arguments, stream=stream)


def stream_of(device: torch.device) -> int | None:
    """Return a handle of a GPU's current stream; None on other devices."""
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else None


def is_captured(device: torch.device) -> bool:
    """Tell whether what is launched on a GPU's current stream is recorded in a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_HERE = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on this device, not on the current one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE


def run_on(device: torch.device, run: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """Launch on a device, and log a call that had to compile, or to read Triton's cache."""
    start_s = time.perf_counter()
    with on_device(device):
        run(*arguments, **named)
    seconds = time.perf_counter() - start_s
    if seconds > 0.1:
        log.info("attention: the first call of a kernel took %.1f s", seconds)
