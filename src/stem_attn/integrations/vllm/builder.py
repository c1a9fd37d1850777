"""Metadata of one step: the dense parent's, and what Stem does with the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from stem_attn import backends
from stem_attn.backends.base import Geometry
from stem_attn.integrations.vllm.compat import (
    VLLM_VERSION,
    Requests,
    Told,
    attends_in_chunks,
    does_without,
    is_draft_layer,
    lacks,
    part_of,
)
from stem_attn.integrations.vllm.counters import counters
from stem_attn.integrations.vllm.impl import StemImpl
from stem_attn.integrations.vllm.layers import table
from stem_attn.integrations.vllm.plan import DECODE, Request, Rest, Run, Split, runs_of, split_batch
from stem_attn.integrations.vllm.settings import CHOOSER, KEY, Settings, allows_choice, choose, settings_of
from stem_attn.policy import USUAL_REASONS

logger = init_logger("vllm.stem")

_ASKED_FOR = "asked for"
_CHOICE_UNKNOWN = "choice unknown"
_EXPECTED = USUAL_REASONS | {_ASKED_FOR}


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
class LayerPlan:
    """What some layers do in one step.

    Args:
        runs: The sparse tokens, in the form that the device's `attend` takes; at least one.
        rest: The others, or None if there are none.
    """

    runs: tuple[Any, ...]
    rest: DenseRest | None


StepPlan = Mapping[StemImpl, LayerPlan]
"""What the layers of one step do; those that are not in it leave everything to the dense parent."""


class StemBuilder:
    """Stand before an `AttentionMetadataBuilder` class, and note a `StepPlan` on what it builds, as its `plan`.

    Where Stem is not selected, nothing is noted.
    """

    reorder_batch_threshold: int | None  # the parent's: up to so many tokens of a request are a decode

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)  # type: ignore[call-arg]
        self._settings = settings_of(vllm_config)
        model = vllm_config.model_config
        self._geometry = Geometry(device.type, model.dtype, model.get_head_size(), 0)
        self._requests = Requests(KEY)
        self._per_request = False
        self._sparse: list[StemImpl] = []
        self._dense_layers: Counter[str] = Counter()
        self._recording = False
        if self._settings is None:
            return
        self._per_request = not lacks("requests") and allows_choice(vllm_config)
        for what in does_without():
            logger.warning_once("stem-attn does without a part of this vLLM, %s: %s", VLLM_VERSION, what)
        total = vllm_config.model_config.get_total_num_hidden_layers()  # of all pipeline stages together
        self._backend = backends.expected("auto", device.type)
        for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).items():
            impl = layer.impl
            if not isinstance(impl, StemImpl):
                continue
            drafts = is_draft_layer(layer)  # a draft model has another number of layers
            if not drafts:
                self._settings.policy.check_layers(total)
            reason = impl.dense_reason
            if reason is None and attends_in_chunks(layer):
                reason = "chunked attention"  # its cache may be that of full attention
            if reason is None and type(kv_cache_spec) is not FullAttentionSpec:
                reason = type(kv_cache_spec).__name__
            if reason is None and drafts:
                reason = "draft model"
            impl.dense_reason, impl.name, impl.layers = reason, name, total
            if reason is None:
                impl.config_of(self._settings)  # which refuses what cannot be told of the layer
                self._sparse.append(impl)
            else:
                self._dense_layers[reason] += 1
        _log_table(vllm_config, self._settings)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build the metadata of a step; see vLLM's `AttentionMetadataBuilder.build`."""
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self._settings is not None and not self._recording:
            whole.plan = self._plan(common_attn_metadata, self._settings)
        return whole

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Build the metadata of a step of decodes that a CUDA graph records; its tokens are nobody's: not counted."""
        self._recording = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._recording = False

    def build_rest(self, common_attn_metadata: Any) -> Any:
        """Build the parent's metadata for the dense rest of a batch."""
        return super().build(0, common_attn_metadata)  # type: ignore[misc]

    def run_of(self, run: Run, common: Any) -> Any:
        """Return a run in the form that the device's `attend` takes, for some layers of one step."""
        return run

    def _plan(self, common: Any, settings: Settings) -> StepPlan:
        tokens = int(common.query_start_loc_cpu[-1])  # without what pads the batch for a CUDA graph
        for reason, count in self._dense_layers.items():
            counters.count_step(0, {reason: count * tokens}, 0)
        if not self._sparse:
            return {}
        for_all = _why_all_dense(common)
        if for_all is not None:
            self._requests.note_new()
            _say(for_all)
            counters.count_step(0, {for_all: len(self._sparse) * tokens}, 0)
            return {}
        if not common.is_prefilling.any():  # most steps; the host has little time in them
            counters.count_step(0, {DECODE: len(self._sparse) * tokens}, 0)
            _say(DECODE)
            return {}
        requests = self._read(common, settings)
        plan: dict[StemImpl, LayerPlan] = {}
        for dense, impls in self._alike(requests).items():
            decode_len = self.reorder_batch_threshold or 1
            split = split_batch(requests, dense, self._backend, self._geometry, decode_len)
            self._count(split, len(impls))
            if split.spans:
                runs = tuple(self.run_of(run, common) for run in runs_of(split.spans))
                plan.update(dict.fromkeys(impls, LayerPlan(runs, self._dense_rest(common, split.rests))))
        return plan

    def _read(self, common: Any, settings: Settings) -> list[Request]:
        """Return what a batch has of each request."""
        starts = common.query_start_loc_cpu.tolist()
        k_lens = common.seq_lens_cpu_upper_bound.tolist()  # exact for rows in their prompts
        prefilling = common.is_prefilling.tolist()  # rows that pad a batch for a CUDA graph may be missing
        told = self._requests.of(common)
        return [
            Request(
                q_start=starts[row],
                q_len=starts[row + 1] - starts[row],
                k_len=k_lens[row],
                prefilling=prefilling[row],
                prompt_len=told[row].prompt_len,
                settings=self._chosen(settings, told[row]),
            )
            for row in range(len(prefilling))
        ]

    def _chosen(self, settings: Settings, told: Told) -> Settings | str:
        """Return a request's settings: the server's where it may not choose, or where nobody checked a wrong choice.

        Or why it is dense.
        """
        if self._per_request and not told.known:
            logger.warning_once("stem-attn: what requests choose cannot be read here: their prompts are dense")
            return _CHOICE_UNKNOWN
        if told.asked is None:
            return settings
        try:
            if self._per_request:
                return choose(settings, told.asked) or _ASKED_FOR
        except ValueError:
            pass
        logger.warning_once(
            "stem-attn: a request's 'stem' is ignored: requests may choose where the server has --logits-processors %s",
            CHOOSER,
        )
        return settings

    def _alike(self, requests: Sequence[Request]) -> dict[frozenset[Settings], list[StemImpl]]:
        """Group the layers by those of the requests' settings that they are dense by."""
        chosen = {
            request.settings for request in requests if request.prefilling and isinstance(request.settings, Settings)
        }
        found: dict[frozenset[Settings], list[StemImpl]] = {}
        for impl in self._sparse:
            dense = frozenset(settings for settings in chosen if impl.config_of(settings) is None)
            found.setdefault(dense, []).append(impl)
        return found

    def _count(self, split: Split, layers: int) -> None:
        dense = {reason: tokens * layers for reason, tokens in split.reasons.items()}
        unknown = layers * split.unknown_prompt_len_tokens
        counters.count_step(layers * sum(span.q_len for span in split.spans), dense, unknown)
        for reason in dense:
            _say(reason)
        if unknown:
            logger.warning_once(
                "stem-attn: vLLM does not tell the whole prompt's length here; chunks are budgeted by the tokens so far"
            )

    def _dense_rest(self, common: Any, rests: Sequence[Rest]) -> DenseRest | None:
        """Make a batch of the tokens that are not sparse."""
        if not rests:
            return None
        places = [place for rest in rests for place in range(rest.q_start, rest.q_start + rest.q_len)]
        together = places[-1] - places[0] + 1 == len(places)
        device = common.seq_lens.device  # copies to it are not waited for
        tokens: slice | Tensor = slice(places[0], places[-1] + 1)
        if not together:
            tokens = torch.tensor(places, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
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


def _log_table(vllm_config: Any, settings: Settings) -> None:
    """Log once what each of this process's layers does, as soon as the last builder has been made."""
    rows = []
    for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).items():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, StemImpl):
            rows.append((name, "not Stem's", type(impl or layer).__name__))
        elif not hasattr(impl, "name"):
            return  # a builder is still to come
        elif impl.dense_reason is not None:
            rows.append((name, "dense", impl.dense_reason))
        else:
            rows.append((name, "sparse", "") if impl.config_of(settings) else (name, "dense", "dense layer"))
    logger.info_once("stem-attn: what the layers do\n%s", table(rows))


def _why_all_dense(common: Any) -> str | None:
    """Say why a whole batch is dense, whatever its requests are."""
    if common.causal is not True:
        return "non-causal"
    if common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None:
        return "prefill not told from decode"
    if any((common.mm_req_doc_ranges or {}).values()):  # requests without an image have an empty list
        return "multimodal prefix"
    return None


def _say(reason: str) -> None:
    """Log a reason for dense attention once: as a warning where Stem cannot do what it is there for."""
    say = logger.info_once if reason in _EXPECTED else logger.warning_once
    say("stem-attn: dense attention where it could be sparse: %s", reason)
