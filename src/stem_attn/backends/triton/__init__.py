"""The Triton backend: selection and attention on any GPU that Triton compiles for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from stem_attn.backends.base import Backend
from stem_attn.blocks import BlockSelection
from stem_attn.config import Residual, StemConfig


class TritonBackend(Backend):
    """Run Triton kernels; with `TRITON_INTERPRET=1`, on CPU tensors through Triton's interpreter, slowly."""

    name = "triton"

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not _interpreting():
            return "torch sees no GPU"
        return None

    def why_unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        block_size: int,
        window: int | None,
        residual: Residual = "none",
    ) -> str | None:
        if not q.is_cuda and not _interpreting():
            return f"it needs tensors on a GPU, got {q.device}"
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32, got {q.dtype}"
        if block_size not in (16, 32, 64, 128):
            return f"its block sizes are 16, 32, 64 and 128, got {block_size}"
        if max(q.shape[3], v.shape[3]) > 256:
            return f"its head dims go up to 256, got {q.shape[3]} and {v.shape[3]}"
        if q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
            return f"it needs an NVIDIA GPU since Ampere, got {torch.cuda.get_device_name(q.device)}"
        return None

    def suits(self, q: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> bool:
        return q.is_cuda

    def select(
        self, q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig, scale: float, budget: Tensor
    ) -> BlockSelection:
        from stem_attn.backends.triton.selection import select

        return select(q, k, v, config=config, scale=scale, budget=budget)

    def select_paged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        k_len: int,
        *,
        config: StemConfig,
        scale: float,
        budget: Tensor,
    ) -> BlockSelection:
        from stem_attn.backends.triton.selection import select

        return select(q, k, v, config=config, scale=scale, budget=budget, pages=pages, k_len=k_len)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        *,
        scale: float,
        window: int | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from stem_attn.backends.triton.attention import attend

        return attend(q, k, v, selection, scale=scale, window=window, return_lse=return_lse)

    def attend_residual(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from stem_attn.backends.triton.residual import attend_residual

        return attend_residual(q, k, v, selection, scale=scale, return_lse=return_lse)

    def attend_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selections: Sequence[BlockSelection],
        *,
        scale: float,
        residual: Residual = "none",
    ) -> Tensor:
        if residual != "none":  # one launch for all sequences would have no log-sum-exp of each to merge with
            return super().attend_packed(q, k, v, selections, scale=scale, residual=residual)
        from stem_attn.backends.triton.attention import attend_packed

        return attend_packed(q, k, v, selections, scale=scale)

    def attend_paged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_table: Tensor,
        selections: Sequence[BlockSelection],
        *,
        scale: float,
        out: Tensor,
        residual: Residual = "none",
    ) -> None:
        if residual == "mean":
            from stem_attn.backends.triton.residual import attend_paged
        else:
            from stem_attn.backends.triton.attention import attend_paged

        attend_paged(q, k, v, block_table, selections, scale=scale, out=out)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
