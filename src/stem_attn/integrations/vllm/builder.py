"""Metadata of one step: the dense parent's, and what Stem does with the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from stem_attn import backends
from stem_attn.backends.base import Geometry
from stem_attn.integrations.vllm.compat import PromptLengths, is_draft_layer, part_of
from stem_attn.integrations.vllm.counters import counters
from stem_attn.integrations.vllm.impl import StemImpl
from stem_attn.integrations.vllm.layers import layer_config, layer_index
from stem_attn.integrations.vllm.plan import Request, Rest, Span, Split, split_batch
from stem_attn.integrations.vllm.settings import Settings, settings_of

logger = init_logger("vllm.stem")


@dataclass(frozen=True, slots=True)
class DenseRest:
    """The tokens of a step that the dense parent does, as a batch of their own.

    Args:
        tokens: Their places in the whole batch: a slice, or int64 indices.
        metadata: The parent's metadata for them.
    """

    tokens: slice | Tensor
    metadata: Any


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the layers of one step do.

    Args:
        spans: The sparse tokens.
        rest: The others, or None if there are none.
    """

    spans: tuple[Span, ...]
    rest: DenseRest | None


class StemBuilder:
    """Stand before an `AttentionMetadataBuilder` class, and add a `StepPlan` to what it builds.

    `metadata_class` is the parent's metadata dataclass with one more field, `plan: StepPlan | None`. It is None where
    Stem is not selected, where no layer of the group is sparse, and where the batch has no sparse tokens.
    """

    metadata_class: ClassVar[Any]

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)  # type: ignore[call-arg]
        self._settings = settings_of(vllm_config)
        model = vllm_config.model_config
        self._geometry = Geometry(device.type, model.dtype, model.get_head_size(), 0)
        self._prompt_lengths = PromptLengths()
        self._sparse_layers = 0
        self._dense_layers: Counter[str] = Counter()
        if self._settings is None:
            return
        total = vllm_config.model_config.get_total_num_hidden_layers()  # of all pipeline stages together
        policy = self._settings.policy
        policy.check_layers(total)
        self._backend = backends.expected("auto", device.type)
        for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).items():
            impl = layer.impl
            if not isinstance(impl, StemImpl):
                continue
            reason = impl.dense_reason
            if reason is None and type(kv_cache_spec) is not FullAttentionSpec:
                reason = type(kv_cache_spec).__name__
            if reason is None and is_draft_layer(layer):
                reason = "draft model"
            index = layer_index(name)
            if reason is None and index is not None and policy.is_dense_layer(index, total):
                reason = "dense layer"
            impl.dense_reason = reason
            if reason is None:
                impl.config = layer_config(name, self._settings.config, policy, total)
                self._sparse_layers += 1
            else:
                self._dense_layers[reason] += 1
        for reason, count in self._dense_layers.items():
            logger.info_once("stem-attn: %d layers stay dense: %s", count, reason)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build the metadata of a step; see vLLM's `AttentionMetadataBuilder.build`."""
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self._settings is None:
            return whole
        plan = self._plan(common_attn_metadata, self._settings)
        return self.metadata_class(**{f.name: getattr(whole, f.name) for f in fields(whole)}, plan=plan)

    def build_rest(self, common_attn_metadata: Any) -> Any:
        """Build the parent's metadata for the dense rest of a batch."""
        return super().build(0, common_attn_metadata)  # type: ignore[misc]

    def _plan(self, common: Any, settings: Settings) -> StepPlan | None:
        split = self._split(common, settings)
        layers = self._sparse_layers
        dense = {reason: tokens * layers for reason, tokens in split.reasons.items() if layers}
        for reason, count in self._dense_layers.items():
            dense[reason] = dense.get(reason, 0) + count * common.num_actual_tokens
        counters.count_step(
            layers * sum(span.q_len for span in split.spans), dense, layers * split.unknown_prompt_len_tokens
        )
        if split.unknown_prompt_len_tokens and layers:
            logger.warning_once(
                "stem-attn: vLLM does not tell the whole prompt's length here; chunks are budgeted by the tokens so far"
            )
        if not split.spans or not layers:
            return None
        return StepPlan(split.spans, self._dense_rest(common, split.rests))

    def _split(self, common: Any, settings: Settings) -> Split:
        reason = _why_all_dense(common)
        if reason is not None:
            return Split((), (), {reason: common.num_actual_tokens}, 0)
        starts = common.query_start_loc_cpu.tolist()
        k_lens = common.seq_lens_cpu_upper_bound.tolist()  # exact for rows in their prompts
        prefilling = common.is_prefilling.tolist()  # rows that pad a batch for a CUDA graph may be missing
        lengths = self._prompt_lengths.of(common) if any(prefilling) else [None] * len(prefilling)
        requests = [
            Request(starts[row], starts[row + 1] - starts[row], k_lens[row], prefilling[row], lengths[row])
            for row in range(len(prefilling))
        ]
        return split_batch(requests, settings.config, settings.policy, self._backend, self._geometry)

    def _dense_rest(self, common: Any, rests: Sequence[Rest]) -> DenseRest | None:
        """Make a batch of the tokens that are not sparse."""
        if not rests:
            return None
        places = [place for rest in rests for place in range(rest.q_start, rest.q_start + rest.q_len)]
        together = places[-1] - places[0] + 1 == len(places)
        device = common.seq_lens.device  # copies to it are not waited for
        indices = torch.tensor(places, dtype=torch.int64, device="cpu")
        tokens = slice(places[0], places[-1] + 1) if together else indices.to(device, non_blocking=True)
        rows = torch.tensor([rest.row for rest in rests], dtype=torch.int64, device="cpu")
        device_rows = rows.to(device, non_blocking=True)
        lengths = torch.tensor([0, *(rest.q_len for rest in rests)], dtype=torch.int32, device="cpu")
        starts = lengths.cumsum(0, dtype=torch.int32)
        batch = part_of(
            common,
            query_start_loc=starts.to(device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[device_rows],
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[rows],
            is_prefilling=common.is_prefilling[rows],
            num_reqs=len(rests),
            num_actual_tokens=len(places),
            max_query_len=max(rest.q_len for rest in rests),
            block_table_tensor=common.block_table_tensor[device_rows],
            slot_mapping=common.slot_mapping[tokens],
            positions=None if common.positions is None else common.positions[tokens],
        )
        return DenseRest(tokens, self.build_rest(batch))


def _why_all_dense(common: Any) -> str | None:
    """Say why a whole batch is dense, whatever its requests are."""
    if common.causal is not True:
        return "non-causal"
    if common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None:
        return "prefill not told from decode"
    if common.mm_req_doc_ranges:
        return "multimodal prefix"
    return None
