"""Launch a kernel again and again with everything but its tensors fixed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton


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


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def can_chain(device: torch.device) -> bool:
    """Tell whether a kernel can be launched before its predecessor has ended: on NVIDIA's GPUs since Hopper."""
    return capability_of(device) >= (9, 0)


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
