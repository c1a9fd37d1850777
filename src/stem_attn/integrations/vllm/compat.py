"""All that differs between vLLM versions: which were run, and the places that vLLM does not promise to keep."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import vllm
from vllm.version import __version__

from stem_attn.integrations.vllm.interface import missing, read_offer

try:
    from vllm.v1.worker.gpu.sample import logits_processor

    V2LogitsProcessor: Any = logits_processor.LogitsProcessor
except ImportError:  # 0.26's V2 runner takes no logits processors, and leaves a server that has some to the V1 runner
    V2LogitsProcessor = object

VLLM_VERSION: str = __version__
_RUN = {"cuda": ("0.26", "0.32", "0.33"), "cpu": ("0.32",)}

# Parts that the plugin can do without, and what then happens. Read where an engine has Stem: their files are large.
_WITHOUT = {
    "V1 runner": "with the V1 model runner the lengths of whole prompts are unknown",
    "V2 runner": "with the V2 model runner the lengths of whole prompts are unknown",
    "requests": "requests have the server's settings",
}
_RUNNERS = {"V1 runner": "vllm.v1.worker.gpu_model_runner", "V2 runner": "vllm.v1.worker.gpu.model_runner"}

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
    absent = _absent("everywhere", platform)
    return f"stem-attn does not know this vLLM, {VLLM_VERSION}: {'; '.join(absent)}" if absent else None


@cache
def lacks(part: str) -> tuple[str, ...]:
    """Name what the installed vLLM lacks of a part that the plugin can do without; it then uses nothing of the part."""
    return _absent(part)


def does_without() -> list[str]:
    """Say for each such part what the installed vLLM lacks of it, and what happens without; of loaded runners only."""
    parts = [part for part in _WITHOUT if _RUNNERS.get(part, "vllm") in sys.modules and lacks(part)]
    return [f"{'; '.join(lacks(part))}: {_WITHOUT[part]}" for part in parts]


def _absent(*parts: str) -> tuple[str, ...]:
    return tuple(missing(read_offer(Path(vllm.__path__[0]).parent, parts), parts))


def why_unknown(platform: str, version: str = VLLM_VERSION) -> str | None:
    """Say that nobody has run the plugin on a vLLM of this version, or return None."""
    numbers = re.match(r"\d+\.\d+", version)
    if numbers and numbers[0] in _RUN[platform]:
        return None
    return f"stem-attn was run on vLLM {', '.join(_RUN[platform])} on {platform.upper()}, and this is {version}"


def names_backends() -> bool:
    """Tell whether this vLLM lets a plugin name its backend. Earlier ones have but one free name, `CUSTOM`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return hasattr(AttentionBackendEnum, "register")


def is_draft_layer(layer: Any) -> bool:
    """Tell whether a layer is a draft model's. vLLM 0.26 marks none."""
    return bool(getattr(layer, "is_draft_layer", False))


def attends_in_chunks(layer: Any) -> bool:
    """Tell whether a layer attends within chunks of a sequence (Llama 4): vLLM gives it batches of chunks."""
    return getattr(layer, "attention_chunk_size", None) is not None


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


@dataclass(frozen=True, slots=True)
class Told:
    """What the model runner knows of a request.

    Args:
        prompt_len: Tokens of its whole prompt; None: that cannot be told.
        asked: What it asks of Stem, unchecked; None: nothing.
        known: Whether the runner could be asked at all.
    """

    prompt_len: int | None
    asked: Any = None
    known: bool = True


_UNKNOWN = Told(None, known=False)


class Requests:
    """Ask the model runner how long the requests' prompts are, and what they ask of Stem.

    Args:
        key: Under which they do so.

    vLLM tells a metadata builder whether a request is being prefilled, and no more. The runner knows. The builder is
    not given the runner, so this looks up who called: at the first step it walks up the call stack to the runner's own
    method, and keeps a weak reference. Nothing of vLLM is replaced.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._runner: weakref.ref[Any] | None = None
        self._asked: dict[str, Any] = {}  # by id of request; the V2 runner forgets it after a request's first step

    def of(self, common: Any) -> list[Told]:
        """Return what is known of every row of `is_prefilling`.

        Args:
            common: `CommonAttentionMetadata` of the batch the runner is preparing.
        """
        rows = len(common.is_prefilling)
        runner = self._runner() if self._runner is not None else None
        if runner is None:
            runner = _calling_runner()
            if runner is None:
                return [_UNKNOWN] * rows
            self._runner = weakref.ref(runner)
        known = self._of_v2(runner, common, rows) if hasattr(runner, "req_states") else self._of_v1(runner, rows)
        if known is None:
            return [_UNKNOWN] * rows
        # The rows are the runner's own if they agree on which requests are still being prefilled.
        computed = (common.seq_lens_cpu_upper_bound - common.query_start_loc_cpu.diff())[:rows]
        return [
            told if (int(before) < prefill) == bool(prefilling) else _UNKNOWN
            for (told, prefill), before, prefilling in zip(known, computed, common.is_prefilling, strict=True)
        ]

    def note_new(self) -> None:
        """Keep what requests ask at their first step: the V2 runner forgets it afterwards, the V1 runner does not."""
        if lacks("requests"):
            return
        runner = self._runner() if self._runner is not None else None
        if runner is not None and not hasattr(runner, "req_states"):
            return
        for request in _new_requests():
            asked = self._choice(request.sampling_params)
            self._asked.pop(request.req_id, None)
            if asked is not None:
                self._asked[request.req_id] = asked

    def _of_v2(self, runner: Any, common: Any, rows: int) -> list[tuple[Told, int]] | None:
        """Return every row's request and how many tokens the runner calls prefill; its own order is another one."""
        states, indices = runner.req_states, _request_indices(common)
        if indices is None or len(indices) < rows:
            return None
        self.note_new()
        self._asked = {name: x for name, x in self._asked.items() if name in states.req_id_to_index}
        return [
            (
                Told(int(states.prompt_len.np[i]), self._asked.get(states.index_to_req_id.get(int(i), ""))),
                int(states.prefill_len.np[i]),  # a preempted request's answer is in it
            )
            for i in indices[:rows]
        ]

    def _of_v1(self, runner: Any, rows: int) -> list[tuple[Told, int]] | None:
        """Return the same of the V1 runner; its rows are the batch's, save where the batch is computed in parts."""
        batch = runner.input_batch
        if runner.parallel_config.use_ubatching or rows < batch.num_reqs:
            return None
        lengths = [int(n) for n in batch.num_prompt_tokens[:rows]]
        names = [*batch.req_ids, *[None] * rows][:rows]  # rows may pad a batch
        asked = [None if name is None else self._choice(runner.requests[name].sampling_params) for name in names]
        return [(Told(length, one), length) for length, one in zip(lengths, asked, strict=True)]

    def _choice(self, params: Any) -> Any:
        """Return what a request asks for; a pooling model's has no sampling parameters."""
        if lacks("requests"):
            return None
        return (getattr(params, "extra_args", None) or {}).get(self._key)


def _callers() -> Iterator[Mapping[str, Any]]:
    """Yield the local variables of everyone up the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


def _calling_runner() -> Any | None:
    """Find the model runner among the callers; one that lacks something of what it is asked for is none."""
    names = [name for part, name in _RUNNERS.items() if name in sys.modules and not lacks(part)]
    runners = tuple(sys.modules[name].GPUModelRunner for name in names)
    return next((who["self"] for who in _callers() if isinstance(who.get("self"), runners)), None)


def _request_indices(common: Any) -> Any | None:
    """Return which of the V2 runner's requests each row of a batch is."""
    if hasattr(common, "req_idx"):
        return common.req_idx
    # vLLM 0.26 does not tell; the V2 runner's own batch does, which a caller of the builder holds.
    batches = (who["input_batch"] for who in _callers() if "input_batch" in who)
    return next((batch.idx_mapping_np for batch in batches if hasattr(batch, "idx_mapping_np")), None)


def _new_requests() -> Sequence[Any]:
    """Return the requests whose first step this is; who calls the runner tells it of them."""
    steps = (who["scheduler_output"] for who in _callers() if "scheduler_output" in who)
    return next((step.scheduled_new_reqs for step in steps), ())


def admitted() -> tuple[Any, str | None] | None:
    """Return an engine's config and the `cache_salt` of the request that a caller is admitting; None: nobody is."""
    for who in _callers():
        config = getattr(who.get("self"), "vllm_config", None)
        if config is not None and "prompt" in who and "params" in who:
            prompt = who["prompt"]
            return config, prompt.get("cache_salt") if isinstance(prompt, dict) else None
    return None
