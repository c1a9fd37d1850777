"""The Triton backend: selection and attention on any GPU that Triton compiles for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from stem_attn.backends.base import Backend, Geometry, PreparedCall
from stem_attn.blocks import BlockSelection
from stem_attn.budget import Budget
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part

OLDEST_TRITON = (3, 4)
"""The first with tensor descriptors; PyTorch 2.8 brings it."""

# (tokens below which a step applies, density up to which sparse is faster).
# One H100, bfloat16, head dim 128, cuDNN (benchmarks/results/h100-short-half, docs/log.md), whole calls in ms at
# density d: 4096 tokens 0.043 + 0.253 d against 0.258, so 0.85; 8192 tokens 0.066 + 0.85 d against 0.899, so 0.98,
# less some margin. Shorter calls take the host longer than the device.
_BREAK_EVEN = ((4096, 0.0), (8192, 0.85), (None, 0.95))
# Mass scores and shared budgets (the same GPU, version 0.1.0): 8192 tokens 0.107 + 0.95 d against 0.885,
# so 0.82; 16384 tokens 0.196 + 3.47 d against 3.30, so 0.89; less a margin. At 4096 two more launches take the host
# longer. Selection has become faster since (0.07 at 8192); the steps stay: a density of .85 gains little either way.
# Eight bits, H100 and H200 (benchmarks/results/h100-fp8-times.txt): 8192 tokens take the device 0.07 for the selection,
# 0.11 to round and 0.76 d, against 0.956. A call of its own takes the host 0.7 (h200-llama3-8b-fp8); in a model the
# host runs ahead, and one of Llama-3.1-8B's shape is 1.10 times as fast as dense (h200-ttft-fp8).
_BREAK_EVEN_MORE_LAUNCHES = ((8192, 0.0), (16384, 0.7), (None, 0.85))


class TritonBackend(Backend):
    """Run Triton kernels; with `TRITON_INTERPRET=1`, on CPU tensors through Triton's interpreter, slowly."""

    name = "triton"
    automatic_on = ("cuda",)

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not _interpreting():
            return "torch sees no GPU"
        import triton

        if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return f"it needs Triton {oldest} or later, which PyTorch 2.8 brings; this is Triton {triton.__version__}"
        return None

    def why_unsupported(self, call: Call) -> str | None:
        q = call.q
        if not q.is_cuda and not _interpreting():
            return f"it needs tensors on a GPU, got {q.device}"
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32, got {q.dtype}"
        if q.dtype == torch.bfloat16 and not q.is_cuda:
            return "Triton's interpreter has no bfloat16 products"
        if call.block_size not in (16, 32, 64, 128):
            return f"its block sizes are 16, 32, 64 and 128, got {call.block_size}"
        if max(q.shape[3], call.v.shape[3]) > 256:
            return f"its head dims go up to 256, got {q.shape[3]} and {call.v.shape[3]}"
        if q.is_cuda and torch.version.hip is None:
            from stem_attn.backends.triton.devices import capability_of

            if capability_of(q.device) < (8, 0):
                return f"it needs an NVIDIA GPU since Ampere, got {torch.cuda.get_device_name(q.device)}"
        if call.precision == "fp8":
            from stem_attn.backends.triton.fp8 import why_unsupported

            return why_unsupported(call)
        return None

    def break_even(self, geometry: Geometry, config: StemConfig) -> float:
        plain = config.score == "linear" and config.budget_scope == "head" and config.precision == "auto"
        steps = _BREAK_EVEN if plain else _BREAK_EVEN_MORE_LAUNCHES
        return next(density for below, density in steps if below is None or geometry.tokens < below)

    def select(self, call: Call, part: Part, config: StemConfig, budget: Budget) -> BlockSelection:
        from stem_attn.backends.triton.selection import select

        return select(call, part, config, budget)

    def attend(self, call: Call, selections: Sequence[BlockSelection], out: Tensor, lse: Tensor | None) -> None:
        from stem_attn.backends.triton import attention, fp8, residual

        chosen = fp8 if call.precision == "fp8" else attention if call.residual == "none" else residual
        chosen.attend(call, selections, out, lse)

    def prepare(self, call: Call, config: StemConfig, out: Tensor) -> PreparedCall | None:
        from stem_attn.backends.triton.prepared import prepare

        return prepare(call, config, out)

    def attend_if(self, call: Call, wanted: Tensor, out: Tensor) -> None:
        from stem_attn.backends.triton.attention import attend

        attend(call, self._everything(call), out, None, wanted)

    def compare_rows(self, call: Call, part: Part, selection: BlockSelection, out: Tensor, places: Tensor) -> Tensor:
        from stem_attn.backends.triton.exact_rows import compare_rows

        return compare_rows(call, part, selection, out, places)

    def add_up(self, found: Tensor, q_len: int) -> Tensor:
        from stem_attn.backends.triton.verdict import add_up

        return add_up(found, q_len)

    def misses(
        self, sums: Tensor, queries: int, rows: int, min_recall: float | None, max_error: float | None
    ) -> Tensor:
        from stem_attn.backends.triton.verdict import misses

        return misses(sums, queries, rows, min_recall, max_error)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
