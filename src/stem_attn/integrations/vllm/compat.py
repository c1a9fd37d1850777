"""All that differs between vLLM versions: which were run, and the places that vLLM does not promise to keep."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import vllm
from vllm.version import __version__

from stem_attn.integrations.vllm.interface import missing, read_offer

VLLM_VERSION: str = __version__
_RUN = {"cuda": ("0.26",), "cpu": ("0.32",)}

# What a batch's metadata derives from all its rows; no version has all of these fields.
_OF_ALL_ROWS = (
    "req_idx",
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
)


def why_unsupported(platform: str) -> str | None:
    """Name what the installed vLLM lacks of what the plugin uses on a platform, `cuda` or `cpu`; None: nothing."""
    parts = ("everywhere", platform)
    lacks = missing(read_offer(Path(vllm.__path__[0]).parent, parts), parts)
    return f"stem-attn does not know this vLLM, {VLLM_VERSION}: {'; '.join(lacks)}" if lacks else None


def why_unknown(platform: str, version: str = VLLM_VERSION) -> str | None:
    """Say that nobody has run the plugin on a vLLM of this version, or return None."""
    numbers = re.match(r"\d+\.\d+", version)
    if numbers and numbers[0] in _RUN[platform]:
        return None
    return f"stem-attn was run on vLLM {' and '.join(_RUN[platform])} on {platform.upper()}, and this is {version}"


def names_backends() -> bool:
    """Tell whether this vLLM lets a plugin name its backend. Earlier ones have but one free name, `CUSTOM`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return hasattr(AttentionBackendEnum, "register")


def is_draft_layer(layer: Any) -> bool:
    """Tell whether a layer is a draft model's. vLLM 0.26 marks none."""
    return bool(getattr(layer, "is_draft_layer", False))


def instruction_set(layer: Any, impl: Any) -> str:
    """Return the instructions that vLLM's CPU platform packs a layer's keys for. In 0.26 the implementation knows."""
    return str(layer.isa if hasattr(layer, "isa") else impl.isa)


def part_of(common: Any, **fields: Any) -> Any:
    """Return the metadata of a part of a batch.

    Args:
        common: `CommonAttentionMetadata` of the whole.
        **fields: Those of the part that differ.
    """
    return common.replace(**{name: None for name in _OF_ALL_ROWS if hasattr(common, name)}, **fields)


class PromptLengths:
    """Ask the model runner how long the requests' prompts are.

    vLLM tells a metadata builder whether a request is being prefilled, but not how long its prompt is. The
    runner knows. The builder is not given the runner, so this looks up who called: at the first step it walks up the
    call stack to the runner's own method, and keeps a weak reference. Nothing of vLLM is replaced.
    """

    def __init__(self) -> None:
        self._runner: weakref.ref[Any] | None = None

    def of(self, common: Any) -> list[int | None]:
        """Return the whole prompt's tokens of every row of `is_prefilling`, None where they cannot be told.

        Args:
            common: `CommonAttentionMetadata` of the batch the runner is preparing.
        """
        rows = len(common.is_prefilling)
        runner = self._runner() if self._runner is not None else None
        if runner is None:
            runner = _calling_runner()
            if runner is None:
                return [None] * rows
            self._runner = weakref.ref(runner)
        told = _lengths(runner, common, rows)
        if told is None:
            return [None] * rows
        # The rows are the runner's own if they agree on which requests are still being prefilled.
        computed = (common.seq_lens_cpu_upper_bound - common.query_start_loc_cpu.diff())[:rows]
        return [
            prompt if (int(before) < prefill) == bool(prefilling) else None
            for (prompt, prefill), before, prefilling in zip(told, computed, common.is_prefilling, strict=True)
        ]


def _callers() -> Iterator[Mapping[str, Any]]:
    """Yield the local variables of everyone up the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


def _calling_runner() -> Any | None:
    """Find the model runner among the callers."""
    names = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
    runners = tuple(sys.modules[name].GPUModelRunner for name in names if name in sys.modules)
    return next((who["self"] for who in _callers() if isinstance(who.get("self"), runners)), None)


def _lengths(runner: Any, common: Any, rows: int) -> list[tuple[int, int]] | None:
    """Return the tokens of every row's prompt, and how many the runner calls prefill; None where it cannot tell."""
    if hasattr(runner, "req_states"):  # the V2 runner keeps its requests in an order of their own
        requests = _requests(common)
        if requests is None or len(requests) < rows:
            return None
        prompts = runner.req_states.prompt_len.np[requests[:rows]]
        prefills = runner.req_states.prefill_len.np[requests[:rows]]  # a preempted request's answer is in it
    else:  # the V1 runner; its rows are the batch's, save where the batch is computed in parts
        if runner.parallel_config.use_ubatching or rows < runner.input_batch.num_reqs:
            return None
        prompts = prefills = runner.input_batch.num_prompt_tokens[:rows]
    return [(int(prompt), int(prefill)) for prompt, prefill in zip(prompts, prefills, strict=True)]


def _requests(common: Any) -> Any | None:
    """Return which of the V2 runner's requests each row of a batch is."""
    if hasattr(common, "req_idx"):
        return common.req_idx
    # vLLM 0.26 does not tell; the V2 runner's own batch does, which a caller of the builder holds.
    batches = (who["input_batch"] for who in _callers() if "input_batch" in who)
    return next((batch.idx_mapping_np for batch in batches if hasattr(batch, "idx_mapping_np")), None)
