"""The CPU backend: a kernel that is compiled for the machine, or batched matmuls in plain torch.

What the kernel does not take (float64, other devices) and machines without a C++ compiler run on the matmuls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stem_attn import fallbacks
from stem_attn.backends.base import BlockedBackend, Geometry
from stem_attn.backends.cpu import gathered, native
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.workers import on_worker


class CpuBackend(BlockedBackend):
    """Attend over kept blocks on a CPU; on another device, slowly."""

    name = "cpu"
    automatic_on = ("*",)

    def how(self) -> str:
        reason = native.why_not()
        return f"in plain torch, which is slower: {reason}" if reason else "a kernel compiled for this CPU"

    def why_unsupported(self, call: Call) -> str | None:
        if call.precision != "auto":
            return f"it multiplies in the inputs' precision, got precision={call.precision!r}"
        return None

    def break_even(self, geometry: Geometry, config: StemConfig) -> float:
        # Zen 4, float32, 8192 tokens, head dim 64 (docs/log.md), plain torch: attention is 3.1 times as fast as SDPA at
        # density .28, so d costs 1.2 d, and the selection a tenth of it; what is left is a margin for other machines.
        # Compiled, d costs 0.9 d or less: the margin is wider, and what is dense does not depend on a compiler.
        # A Xeon with AMX, 16 threads, density .28, plain torch: the whole takes twice SDPA's time in bfloat16.
        on_cpu = geometry.device_type == "cpu"
        in_tiles = on_cpu and geometry.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        return 0.0 if in_tiles and native.why_not() else 0.5

    def attend_part(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        if native.takes(q):
            reason = native.why_not()
            if reason is None:
                threads = torch.get_num_threads()
                on_worker(lambda: native.attend_blocks(call, q, k, v, selection, out, lse, threads), q.device)
                return
            fallbacks.note("the CPU backend computes in plain torch, which is slower", f"cpu: {reason}")
        gathered.attend_blocks(call, q, k, v, selection, out, lse)
