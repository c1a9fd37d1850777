"""What a GPU, and the Triton that compiles for it, can do."""

from __future__ import annotations

import logging
from functools import cache

import torch
import triton

log = logging.getLogger("stem_attn")

TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])
"""The version, of which the project knows what differs:

- 3.7 and 3.9 renamed what the Gluon kernels use; `hopper_kernel.py` takes either name;
- 3.7 adds up over a dimension through shared memory, 4 bytes for every number; see `SUMS_TAKE_SHARED_MEMORY`.
"""
SUMS_TAKE_SHARED_MEMORY = TRITON == (3, 7)
GLUON_TRITON = ((3, 6), (3, 9))
"""The oldest and the newest Triton that the Hopper kernel was compiled with; run with 3.6 and 3.8."""


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def can_chain(device: torch.device) -> bool:
    """Tell whether a kernel can be launched before its predecessor has ended: on NVIDIA's GPUs since Hopper."""
    return capability_of(device) >= (9, 0)


def has_copy_engine(device: torch.device) -> bool:
    """Tell whether tiles should be copied by descriptor: on NVIDIA's data-centre GPUs since Hopper.

    Consumer Blackwell has the engine too, but there Triton 3.6 spills thousands of bytes a thread with it.
    """
    return device.type == "cuda" and torch.version.hip is None and capability_of(device)[0] in (9, 10)


def gluon_runs_on(device: torch.device) -> bool:
    """Tell whether the Hopper kernels run on a device."""
    if device.type != "cuda" or torch.version.hip is not None or capability_of(device) != (9, 0):
        return False
    return _gluon_known()


@cache
def _gluon_known() -> bool:
    """Tell whether this Triton can compile the Hopper kernel: Gluon is experimental, and its names change."""
    known = GLUON_TRITON[0] <= TRITON <= GLUON_TRITON[1]
    if not known:
        log.warning("Triton %s is not known to compile the Hopper kernel: the portable one runs", triton.__version__)
    return known
