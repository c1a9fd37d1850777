"""The FA4 backend: block-sparse lists handed to the optional package flash-attn-4, on Hopper."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from stem_attn.backends.base import BlockedBackend, Geometry
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.config import StemConfig

BLOCK = 128  # FA4's query and key tile at these head dims


class Fa4Backend(BlockedBackend):
    """Attend through FlashAttention-4's CuTe kernels; the selections are the Triton backend's.

    FA4 counts query blocks from the first query, so a prefix must be whole blocks. Its Blackwell kernel pairs two
    query tiles on one list, which a selection with a list per 128 queries does not give, so it is not used there.
    """

    name = "fa4"
    selector = "triton"

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            return 'the package flash-attn-4 is not installed (pip install "stem-attn[fa4]")'
        if not torch.cuda.is_available() or torch.version.hip is not None:
            return "torch sees no NVIDIA GPU"
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if (9, 0) not in capabilities:
            return f"it needs a Hopper GPU (compute capability 9.0), got {sorted(capabilities)}"
        return None

    def why_unsupported(self, call: Call) -> str | None:
        q, v = call.q, call.v
        if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
            return f"it needs tensors on a Hopper GPU, got {q.device}"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, got {q.dtype}"
        if call.block_size != BLOCK:
            return f"its block size is {BLOCK}, got {call.block_size}"
        for part in call.parts:
            if (part.k_len - part.q_len) % BLOCK:
                return f"its prefix must be a multiple of {BLOCK} tokens, got {part.k_len - part.q_len}"
        head_dims = q.shape[3], v.shape[3]
        if head_dims[0] > 192 or head_dims[1] > 128 or any(d % 8 for d in head_dims):
            return f"its head dims are multiples of 8 up to 192 for q and k and 128 for v, got {head_dims}"
        if call.window is not None:
            return "it has no sliding window over block lists"
        if call.softcap is not None or call.sinks is not None:
            return "softcap and sinks were never tried with it over block lists"
        if call.precision != "auto":
            return f"it has no kernel with 8-bit products (precision={call.precision!r})"
        if call.residual != "none":
            return f"it has no kernel that merges the means of pruned blocks (residual={call.residual!r})"
        return None

    def break_even(self, geometry: Geometry, config: StemConfig) -> float:
        # An H100, 8192 to 131072 tokens (docs/log.md): selection and attention take up to 6% longer than the Triton
        # backend's, over the same blocks. So this is the lowest density of its table.
        return 0.7 if geometry.tokens >= 8192 else 0.0

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
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        with torch.cuda.device(q.device), torch.no_grad():
            result, result_lse = flash_attn_func(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                softmax_scale=call.scale,
                causal=True,
                pack_gqa=False,  # heads of a group have lists of their own
                block_sparse_tensors=BlockSparseTensorsTorch(**block_lists(selection), block_size=(BLOCK, BLOCK)),
                return_lse=lse is not None,
            )
        out.copy_(result.transpose(1, 2))
        if lse is not None:
            lse.copy_(result_lse)


def block_lists(selection: BlockSelection) -> dict[str, Tensor]:
    """Return FA4's two lists: the diagonal block of each row, which needs a mask, and the others, which do not.

    A row's diagonal block is the last it keeps, so the list of the others is the row's own, one entry shorter.

    Returns:
        int32 `mask_block_cnt` [1, 1, Qb] and `mask_block_idx` [1, 1, Qb, 1]; `full_block_cnt` [B, Hq, Qb] and
        `full_block_idx` [B, Hq, Qb, at most Kb].
    """
    grid = selection.grid
    diagonal = torch.arange(grid.first_block, grid.k_blocks, dtype=torch.int32, device=selection.counts.device)
    return {
        "mask_block_cnt": torch.ones_like(diagonal)[None, None],
        "mask_block_idx": diagonal[None, None, :, None],
        "full_block_cnt": selection.counts - 1,
        "full_block_idx": selection.indices[..., : grid.k_blocks],
    }
