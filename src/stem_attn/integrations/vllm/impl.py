"""One layer's attention: sparse spans here, everything else by the dense parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType

import stem_attn
from stem_attn import backends
from stem_attn.config import StemConfig
from stem_attn.integrations.vllm import layers
from stem_attn.integrations.vllm.compat import VLLM_VERSION
from stem_attn.integrations.vllm.settings import Settings, describe, settings_of

logger = init_logger("vllm.stem")


class Properties(TypedDict):
    """Keywords of the library's functions."""

    softcap: float | None
    sinks: Tensor | None


class StemImpl:
    """Stand before an `AttentionImpl` class, and take the sparse spans out of its batches.

    A device's class adds `attend`. What a layer is made of arrives in vLLM's order of arguments.
    """

    device_name: str  # for the startup line
    cache_dtypes: ClassVar[tuple[str, ...]] = ("auto", "bfloat16", "float16", "float32")  # that `attend` reads
    settings: Settings  # the server's; a request may have others
    dense_reason: str | None  # why the dense parent does the whole layer; the builder may add one
    kv_cache_dtype: str  # the parent's, as the next three are
    logits_soft_cap: float  # 0: none
    scale: float
    sinks: Tensor | None  # [Hq]; their values come after the layer is made
    name: str  # vLLM's of the layer, and how many layers the model has; the builder sets both
    layers: int

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
            **kwargs,
        )  # type: ignore[call-arg]
        vllm_config = get_current_vllm_config()
        settings = settings_of(vllm_config)
        assert settings is not None  # the backend gives this class only where Stem is selected
        ranks = vllm_config.parallel_config.decode_context_parallel_size
        if ranks > 1:
            raise ValueError(
                "stem-attn: the keys of a request must lie on one GPU, and --decode-context-parallel-size "
                f"{ranks} spreads them: leave it at 1, or take another attention backend"
            )
        self.settings = settings
        self.dense_reason = layers.why_dense(
            attn_type=AttentionType(attn_type).value,
            sliding_window=sliding_window,
            alibi_slopes=alibi_slopes,
            kv_cache_dtype=kv_cache_dtype,
            readable=self.cache_dtypes,
        )
        # Before weights are loaded. Beside a draft model this may be a layer of its: then the builder refuses.
        if self.dense_reason is None and vllm_config.speculative_config is None:
            settings.policy.check_layers(vllm_config.model_config.get_total_num_hidden_layers())
        logger.info_once(
            "stem-attn %s on vLLM %s: %s, backend STEM on %s, sparse prefill for prompts from %d tokens",
            stem_attn.__version__,
            VLLM_VERSION,
            describe(settings),
            self.device_name,
            settings.policy.min_seq_len,
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the attention of the batch into `output`.

        Args:
            layer: vLLM's attention layer.
            query: [tokens, Hq, D].
            key: [tokens, Hkv, D]; already in the cache, which alone is read. None from models that write it there.
            value: [tokens, Hkv, D], likewise.
            kv_cache: The layer's pages.
            attn_metadata: The parent's with a `plan`, or None in a profiling run.
            output: [tokens, Hq, D].
            output_scale: Not supported.
            output_block_scale: Not supported.
        """
        whole = getattr(attn_metadata, "plan", None)
        plan = None if whole is None else whole.get(self)
        if plan is None:
            return super().forward(  # type: ignore[misc, no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        self.attend(layer, query, kv_cache, attn_metadata, plan.runs, output)
        rest = plan.rest
        if rest is not None:
            out = output[rest.tokens]
            k, v = (x if x is None else x[rest.tokens] for x in (key, value))
            super().forward(layer, query[rest.tokens], k, v, kv_cache, rest.metadata, out)  # type: ignore[misc]
            if not isinstance(rest.tokens, slice):
                output[rest.tokens] = out
        return output

    def attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, attn_metadata: Any, runs: Sequence[Any], output: Tensor
    ) -> None:
        """Attend sparsely over the runs' tokens, and write their rows of `output`.

        Args:
            layer: vLLM's attention layer.
            query: [tokens, Hq, D] of the whole batch.
            kv_cache: The layer's pages.
            attn_metadata: The parent's, of the whole batch; `block_table[span.row]` are a request's pages.
            runs: The tokens to do; see `StemBuilder.run_of`.
            output: [tokens, Hq, D] of the whole batch.
        """
        raise NotImplementedError

    @property
    def properties(self) -> Properties:
        """What attention is asked for beside its inputs, as the library's functions take it."""
        return {"softcap": self.logits_soft_cap or None, "sinks": self.sinks}

    def refuse_early(self, backend: str, head_size: int) -> None:
        """Refuse what no kernel computes as the engine starts: at the first long prompt it would end it.

        Args:
            backend: That attends.
            head_size: Of the layer.

        Raises:
            ValueError: It cannot, by the server's settings.
        """
        vllm_config = get_current_vllm_config()
        backends.check_ahead(
            backend,
            self.settings.config,
            head_dim=head_size,
            dtype=vllm_config.model_config.dtype,
            device=vllm_config.device_config.device_type,
            softcap=self.properties["softcap"],
        )

    def config_of(self, settings: Settings) -> StemConfig | None:
        """Return the layer's own config by some settings; None: it is dense by them."""
        return layers.layer_config(self.name, settings, self.layers)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Sparse attention writes its output unquantized."""
        return False
