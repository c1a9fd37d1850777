"""The backend for vLLM's CPU platform: sparse prefill over keys and values gathered from the paged cache.

vLLM packs keys for the machine's instructions, each in its own order. That order is not written down anywhere that a
plugin could read, so it is learned: keys that carry their own index go through vLLM's cache-write operator once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from stem_attn.api import block_sparse_attention, call_of, select_blocks
from stem_attn.integrations.vllm.audited import audit
from stem_attn.integrations.vllm.builder import StemBuilder
from stem_attn.integrations.vllm.compat import instruction_set
from stem_attn.integrations.vllm.counters import counters
from stem_attn.integrations.vllm.impl import StemImpl
from stem_attn.integrations.vllm.layers import layer_index
from stem_attn.integrations.vllm.plan import Run
from stem_attn.integrations.vllm.settings import settings_of
from stem_attn.layout import Layout


class StemCpuBuilder(StemBuilder, CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Build the parent's metadata with Stem's plan."""


class StemCpuImpl(StemImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attend over gathered keys and values."""

    device_name = "CPU"

    def __init__(self, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_heads, head_size, *args, **kwargs)
        if self.dense_reason is None:
            self.refuse_early("auto", head_size)

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, attn_metadata: Any, runs: Sequence[Run], output: Tensor
    ) -> None:
        """See `StemImpl.attend`."""
        for span in (span for run in runs for span in run.spans):
            config = self.config_of(span.settings)
            assert config is not None  # the plan has a layer's sparse spans only
            k, v = gather(kv_cache, attn_metadata.block_table[span.row], span.k_len, instruction_set(layer, self))
            q = query[span.tokens].transpose(0, 1)[None]
            began = time.perf_counter()
            selection = select_blocks(
                q, k, v, config=config, scale=self.scale, prompt_len=span.prompt_len, **self.properties
            )
            counters.count_selection_seconds(time.perf_counter() - began)
            counters.count_blocks(selection.counts, span.causal_blocks)
            out = block_sparse_attention(
                q,
                k,
                v,
                selection,
                scale=self.scale,
                residual=config.residual,
                precision=config.precision,
                **self.properties,
            )
            if span.settings.policy.audit_rows:
                call = call_of(Layout.dense(q, k, v), config, config.block_size, self.scale, **self.properties)
                audit(call, selection, out, span.settings.policy, "auto", layer_index(self.name))
            output[span.tokens] = out[0].transpose(0, 1)


class StemCpuBackend(CPUAttentionBackend):  # type: ignore[misc]
    """CPU_ATTN's class; its layers are the parent's own unless Stem is selected."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the class of the layers' attention."""
        config = get_current_vllm_config_or_none()
        selected = config is not None and settings_of(config) is not None
        return StemCpuImpl if selected else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Return the class of the metadata builders; Stem's is inert where its own config does not select Stem."""
        config = get_current_vllm_config_or_none()
        unselected = config is not None and settings_of(config) is None
        return CPUAttentionMetadataBuilder if unselected else StemCpuBuilder


def gather(kv_cache: Tensor, pages: Tensor, k_len: int, isa: str) -> tuple[Tensor, Tensor]:
    """Copy a request's keys and values out of the paged cache.

    Args:
        kv_cache: [pages, Hkv, page_size, 2 * D], as vLLM's CPU backend lays it out.
        pages: int [n]; the request's pages in order, at least as many as its tokens need.
        k_len: Tokens of the request.
        isa: The instruction set that the layer's keys are packed for.

    Returns:
        k and v, [1, Hkv, k_len, D].
    """
    count, heads, page_size, width = kv_cache.shape
    k_pages, v_pages = kv_cache.view(count, heads, 2, page_size * width // 2).unbind(2)
    dim = width // 2
    k_place, v_place = places(isa, kv_cache.dtype, page_size, dim)
    used = pages[: -(-k_len // page_size)].long()
    gathered = []
    for cache_part, place in ((k_pages, k_place), (v_pages, v_place)):
        # Not index_select, which first copies all of a cache that is not contiguous in this order.
        part = cache_part.transpose(0, 1)[:, used].view(-1, page_size * dim)
        if place is not None:
            part = part.index_select(1, place)
        gathered.append(part.view(1, heads, -1, dim)[:, :, :k_len])
    return gathered[0], gathered[1]


@cache
def places(isa: str, dtype: torch.dtype, page_size: int, dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Find where the numbers of a page lie.

    Args:
        isa: The instruction set that keys are packed for.
        dtype: The cache's.
        page_size: Tokens a page.
        dim: Head dim.

    Returns:
        For keys and for values: int64 [page_size * dim], the place in the page of every number in the order (token,
        dim); None where they lie in that order.

    Raises:
        RuntimeError: vLLM's cache-write operator does not merely reorder the numbers.
    """
    numbers = page_size * dim
    index = torch.arange(numbers, device="cpu").view(page_size, 1, dim)
    slots = torch.arange(page_size, device="cpu")
    packed = torch.zeros(2, numbers, dtype=torch.int64, device="cpu")
    for factor in (256, 1):  # a byte at a time, which every dtype holds exactly
        page = torch.zeros(1, 1, 2 * page_size, dim, dtype=dtype, device="cpu")
        k_page, v_page = page.chunk(2, dim=2)
        codes = (index // factor % 256).to(dtype)
        ops.cpu_attn_reshape_and_cache(codes, codes, k_page, v_page, slots, isa)
        packed += page.view(2, numbers).long() * factor
    found = []
    in_order = torch.arange(numbers, device="cpu")
    for order in packed:
        place = order.argsort()
        if not torch.equal(order[place], in_order):
            raise RuntimeError(f"vLLM's {isa} cache holds keys and values in a form that stem-attn cannot read")
        found.append(None if torch.equal(place, in_order) else place)
    return found[0], found[1]
