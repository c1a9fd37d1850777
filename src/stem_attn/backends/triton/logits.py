"""How kernels make logits: what follows from a call's scale, softcap and sinks on the host."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stem_attn.call import Call

Tanh = Literal["none", "fast", "short", "exact"]
"""How the tanh of a softcap is computed, if at all; see `tanh_kernel.tanh`."""
LOG2_E = math.log2(math.e)


class Logits(NamedTuple):
    """What launches are made for: all that a call says about its logits but the sinks' values.

    Args:
        scale: Factor of the logits.
        softcap: What their magnitude stays below, or None.
        sinks: The sinks' dtype, or None.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.dtype | None = None

    @classmethod
    def of(cls, call: Call, scale: float) -> Logits:
        """Return a call's, with a scale that may stand in for its own."""
        return cls(scale, call.softcap, None if call.sinks is None else call.sinks.dtype)

    @property
    def factor(self) -> float:
        """What a dot product is multiplied with first: the argument of the tanh, where there is a softcap."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap

    @property
    def cap(self) -> float:
        """What the tanh is multiplied with, to give a logit in powers of two; 1 without a softcap."""
        return 1.0 if self.softcap is None else self.softcap * LOG2_E

    def tanh(self, dtype: torch.dtype, device: torch.device) -> Tanh:
        """Choose how the tanh is computed for inputs of a dtype.

        NVIDIA's instruction is off by up to 2^-11 of its value. That is within what bfloat16's weights lose, not within
        what float16's do.
        """
        if self.softcap is None:
            return "none"
        if dtype == torch.float32:
            return "exact"
        return "fast" if dtype == torch.bfloat16 and device.type == "cuda" and torch.version.hip is None else "short"


def sinks_of(sinks: Tensor | None, otherwise: Tensor) -> Tensor:
    """Return a call's sinks as kernels read them, contiguous, or a tensor to fill their place where there are none."""
    return otherwise if sinks is None else sinks.contiguous()
