"""Devices and dtypes by their names on the command line."""

from __future__ import annotations

import torch

from stem_attn.checks import resolve_device
from stem_attn.lab.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


def pick_device(name: str) -> torch.device:
    """Return the device of a name; `"auto"` is CUDA where there is one, and the CPU otherwise.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = resolve_device(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    if device.type not in _DEVICE_TYPES:
        raise InputError(f"cannot use device {name!r}: not one of {', '.join(_DEVICE_TYPES)}")
    return device


def check_dtype(name: str) -> None:
    """Refuse an unknown name of a dtype.

    Raises:
        InputError: It is unknown.
    """
    if name not in ("auto", *DTYPES):
        raise InputError(f"--dtype must be one of auto, {', '.join(DTYPES)}; got {name!r}")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; `"auto"` is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        InputError: It is unknown.
    """
    check_dtype(name)
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name on the command line."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
