"""The backend for vLLM's CUDA platform: sparse prefill that reads the paged cache through the block table.

`compat._RUN` says with which versions it ran on a GPU. Without one, these classes are tested over the metadata that a
real engine's steps had, with Triton's interpreter and with FlashAttention simulated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from stem_attn import fallbacks
from stem_attn.api import call_of
from stem_attn.backends.triton.fp8_pages import widen_pages
from stem_attn.backends.triton.keep_table import keep_tables
from stem_attn.config import StemConfig
from stem_attn.integrations.vllm.audited import audit
from stem_attn.integrations.vllm.builder import StemBuilder
from stem_attn.integrations.vllm.compat import names_backends
from stem_attn.integrations.vllm.counters import counters
from stem_attn.integrations.vllm.impl import StemImpl
from stem_attn.integrations.vllm.layers import layer_index
from stem_attn.integrations.vllm.plan import Run
from stem_attn.integrations.vllm.register import NAME
from stem_attn.integrations.vllm.settings import Settings, choices, settings_of
from stem_attn.layout import Layout
from stem_attn.paged import PagedPrefill
from stem_attn.run import prefill as run_call
from stem_attn.warm_up import warm_up

logger = init_logger("vllm.stem")

FP8 = ("fp8", "fp8_e4m3")
"""vLLM's names of caches that FlashAttention reads in fp8; they are the same."""


class CudaRun(NamedTuple):
    """A run as `StemCudaImpl.attend` takes it.

    Args:
        run: What it is.
        prefill: That computes it in layer after layer.
        block_table: int32 [spans, n]; their pages.
        causal_blocks: Of every span, what a dense head would read.
    """

    run: Run
    prefill: PagedPrefill
    block_table: Tensor
    causal_blocks: tuple[int, ...]


def prefill_of(run: Run, block_table: Tensor) -> PagedPrefill:
    """Return what computes a run, whose pages are int32 [spans, n]."""
    return PagedPrefill(
        cu_seqlens_q=run.cu_seqlens_q,
        seq_lens=run.seq_lens,
        block_table=block_table,
        prompt_len=run.prompt_lens,
        backend="triton",
    )


class StemCudaBuilder(StemBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """Build the parent's metadata with Stem's plan."""

    # Whole-batch graphs hold decodes only: a batch with prompts in it runs its attention eagerly.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # The plan's dense rest has a block table of its own, which vLLM would not update.
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        if self._settings is None:
            return
        # Decodes come first in a batch, so that the dense rest is mostly a slice of it.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        if self._sparse and device.type == "cuda":
            self._warm_up(choices(self._settings) if self._per_request else [self._settings])

    def _warm_up(self, chosen: Sequence[Settings]) -> None:
        """Compile the kernels of all prompts that may come; what it takes is given back before vLLM makes its cache."""
        began = time.perf_counter()
        spec, config = self.kv_cache_spec, self.vllm_config
        audit_rows = chosen[0].policy.audit_rows  # requests cannot choose it
        kinds = {
            (impl.properties["softcap"], None if impl.sinks is None else impl.sinks.dtype) for impl in self._sparse
        }
        for method, (softcap, sinks) in product({settings.config for settings in chosen}, kinds):
            warm_up(
                query_heads=self.num_heads_q,
                kv_heads=spec.num_kv_heads,
                head_dim=spec.head_size,
                max_len=config.model_config.max_model_len,
                chunk=config.scheduler_config.max_num_batched_tokens,
                page_size=spec.block_size,
                config=method,
                softcap=softcap,
                sinks=sinks,
                audit_rows=audit_rows,
                dtype=config.model_config.dtype,
                device=self.device,
                backend="triton",
            )
        if any(impl.kv_cache_dtype in FP8 for impl in self._sparse):
            page = torch.zeros(
                1, spec.num_kv_heads, spec.block_size, 2 * spec.head_size, dtype=torch.uint8, device=self.device
            )
            row = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
            scale = torch.ones((), dtype=torch.float32, device=self.device)
            widen_pages(page.view(torch.float8_e4m3fn), row, [1], scale, scale, config.model_config.dtype)
        # A builder may be made in memory whose numbers vLLM forgets in its sleep mode: nothing may stay there.
        keep_tables.cache_clear()
        fallbacks.settle()
        torch.cuda.empty_cache()
        logger.info_once("stem-attn: kernels compiled in %.1f s", time.perf_counter() - began)

    def run_of(self, run: Run, common: Any) -> CudaRun:
        """See `StemBuilder.run_of`."""
        block_table = common.block_table_tensor[run.rows]
        return CudaRun(run, prefill_of(run, block_table), block_table, tuple(span.causal_blocks for span in run.spans))

    def build_rest(self, common_attn_metadata: Any) -> Any:
        """Build the parent's metadata for the dense rest of a batch.

        A fast build has no schedule made ahead: FlashAttention 3 keeps one in a buffer that the whole batch's metadata
        is using already, for the dense layers.
        """
        return super(StemBuilder, self).build(0, common_attn_metadata, fast_build=True)


class StemCudaImpl(StemImpl, FlashAttentionImpl):  # type: ignore[misc]
    """Attend over the pages of the cache, in place."""

    device_name = "CUDA (Triton)"
    cache_dtypes = (*StemImpl.cache_dtypes, *FP8)
    supports_dcp = False
    supports_pcp = False

    def __init__(self, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_heads, head_size, *args, **kwargs)
        config = get_current_vllm_config()
        if self.dense_reason is None and config.model_config.rswa_window is not None:
            self.dense_reason = "reference sliding window"
        if self.dense_reason is None and head_size > 256:
            self.dense_reason = f"head size {head_size}"
        if self.dense_reason is None:
            self.refuse_early("triton", head_size)

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, attn_metadata: Any, runs: Sequence[CudaRun], output: Tensor
    ) -> None:
        """See `StemImpl.attend`."""
        if self.kv_cache_dtype in FP8:
            kv_cache, query = kv_cache.view(torch.float8_e4m3fn), _widened(query, layer._q_scale, output.dtype)
        for run, prefill, block_table, causal_blocks in runs:
            settings = run.settings
            config = self.config_of(settings)
            assert config is not None  # the plan has a layer's sparse spans only
            pages = kv_cache
            if self.kv_cache_dtype in FP8:
                scales = layer._k_scale, layer._v_scale
                pages, block_table = widen_pages(kv_cache, block_table, run.seq_lens, *scales, output.dtype)
                prefill = prefill_of(run, block_table)
            by_token = pages.transpose(1, 2)  # [pages, page_size, Hkv, 2 * D]
            k, v = by_token.narrow(3, 0, self.head_size), by_token.narrow(3, self.head_size, self.head_size)
            if settings.policy.audit_rows:
                self._attend_audited(query, k, v, block_table, run, config, output)
                continue
            kept = prefill.run(
                query[run.tokens], k, v, config=config, scale=self.scale, **self.properties, out=output[run.tokens]
            )
            for counts, causal in zip(kept, causal_blocks, strict=True):
                # The time that choosing takes is not counted: knowing it would mean waiting for the device.
                counters.count_blocks(counts, causal)

    def _attend_audited(
        self, query: Tensor, k: Tensor, v: Tensor, block_table: Tensor, run: Run, config: StemConfig, output: Tensor
    ) -> None:
        """Attend to a run's spans one after the other, and audit each.

        Args:
            query: [tokens, Hq, D] of the whole batch.
            k: [pages, page_size, Hkv, D].
            v: Likewise.
            block_table: int32 [spans, n].
            run: The spans.
            config: The layer's.
            output: [tokens, Hq, D] of the whole batch; written.
        """
        for n, span in enumerate(run.spans):
            sequence = [0, span.q_len], [span.k_len], block_table[n : n + 1], [span.prompt_len]
            layout = Layout.paged(query[span.tokens], k, v, *sequence)
            call = call_of(layout, config, config.block_size, self.scale, **self.properties)
            out = output[span.tokens].transpose(0, 1)[None]
            _, (selection,) = run_call(call, config, "triton", out)
            counters.count_blocks(selection.counts, span.causal_blocks)
            audit(call, selection, out, run.settings.policy, "triton", layer_index(self.name))


class StemCudaBackend(FlashAttentionBackend):  # type: ignore[misc]
    """FLASH_ATTN's class with Stem's prefill."""

    @staticmethod
    def get_name() -> str:
        """Return the name that the registry has."""
        return NAME if names_backends() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return the class of the layers' attention; the parent's where Stem is selected for other kinds of layers."""
        config = get_current_vllm_config_or_none()
        unselected = config is not None and settings_of(config) is None
        return FlashAttentionImpl if unselected else StemCudaImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Return the class of the metadata builders; without a plan they build what the parent's build."""
        return StemCudaBuilder


def _widened(query: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return queries that vLLM may have made fp8 for the dense parent, in the model's dtype.

    Args:
        query: [tokens, Hq, D].
        scale: float32, one number or one a KV head: a query is what is stored times this.
        dtype: The model's.
    """
    if query.dtype == dtype:
        return query
    groups = query.to(torch.float32).view(len(query), scale.numel(), -1) * scale.view(-1, 1)
    return groups.to(dtype).view(query.shape)
