"""Pages of an fp8 cache, read into pages of a wider dtype that all kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from stem_attn.backends.triton.fp8_pages_kernel import widen_kernel
from stem_attn.backends.triton.launch import on_device


def widen_pages(
    cache: Tensor, block_table: Tensor, seq_lens: Sequence[int], k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Copy the pages of some sequences out of an fp8 cache, times the scales.

    Half the numbers that attention reads of them, and a few percent of its time; the kernels need not know of fp8.

    Args:
        cache: float8_e4m3fn [pages, Hkv, page_size, 2 * D], the keys' dims before the values', last stride 1.
        block_table: int32 [N, pages of the longest], last stride 1.
        seq_lens: Tokens of each sequence.
        k_scale: float32, one number or one a KV head: a key is what is stored times this.
        v_scale: Likewise of values.
        dtype: Of the copy.

    Returns:
        [used pages, Hkv, page_size, 2 * D] in `dtype`, and the block table into it.
    """
    _, heads, page_size, width = cache.shape
    used = [-(-length // page_size) for length in seq_lens]
    pages = torch.cat([row[:count] for row, count in zip(block_table, used, strict=True)])
    out = torch.empty(len(pages), heads, page_size, width, dtype=dtype, device=cache.device)
    scales = torch.stack([scale.float().reshape(-1).expand(heads) for scale in (k_scale, v_scale)])
    with on_device(cache.device):
        widen_kernel[(len(pages), heads)](
            cache,
            pages,
            scales,
            out,
            *cache.stride()[:3],
            heads,
            page_size,
            width,
            ROWS=min(triton.next_power_of_2(page_size), 16),
            COLUMNS=triton.next_power_of_2(width),
        )
    starts = [sum(used[:n]) for n in range(len(used))]
    rows = [torch.arange(start, start + max(used), dtype=torch.int32, device=cache.device) for start in starts]
    return out, torch.stack(rows)
