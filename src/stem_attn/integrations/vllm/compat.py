"""All that differs between vLLM versions: which are supported, and the places that vLLM does not promise to keep.

Importing this file checks the version.
"""

from __future__ import annotations

import re
import sys
import weakref
from types import FrameType
from typing import Any

from vllm.version import __version__

VLLM_VERSION: str = __version__
SUPPORTED = "0.32.x"
_TESTED = (0, 32)


def why_unsupported(version: str = VLLM_VERSION) -> str | None:
    """Say why a version of vLLM is not supported, or return None."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) == _TESTED:
        return None
    return f"stem-attn supports vLLM {SUPPORTED}, and this is {version}"


def require_supported() -> None:
    """Refuse a version that this package does not know.

    Raises:
        ImportError: It is outside the supported range.
    """
    reason = why_unsupported()
    if reason:
        raise ImportError(reason)


class PromptLengths:
    """Ask the model runner how long the requests' prompts are.

    vLLM tells a metadata builder whether a request is still in its prompt, but not how long that prompt is. The
    runner knows. The builder is not given the runner, so this looks up who called: at the first step it walks up the
    call stack to the runner's own method, and keeps a weak reference. Nothing of vLLM is replaced.
    """

    def __init__(self) -> None:
        self._runner: weakref.ref[Any] | None = None

    def of(self, common: Any) -> list[int | None]:
        """Return the whole prompt's tokens of every row of a batch, None where they cannot be told.

        Args:
            common: `CommonAttentionMetadata` of the batch the runner is preparing.
        """
        runner = self._runner() if self._runner is not None else None
        if runner is None:
            runner = _calling_runner()
            if runner is None:
                return [None] * common.num_reqs
            self._runner = weakref.ref(runner)
        lengths = _prompt_lengths(runner, common)
        # The rows are the runner's own if they agree on which requests are still in their prompts.
        computed = common.seq_lens_cpu_upper_bound - common.query_start_loc_cpu.diff()
        agree = [
            length is not None and (int(before) < length) == bool(prefilling)
            for length, before, prefilling in zip(lengths, computed, common.is_prefilling, strict=True)
        ]
        return [length if same else None for length, same in zip(lengths, agree, strict=True)]


def _calling_runner() -> Any | None:
    """Find the model runner among the callers."""
    names = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
    runners = tuple(sys.modules[name].GPUModelRunner for name in names if name in sys.modules)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, runners):
            return owner
        frame = frame.f_back
    return None


def _prompt_lengths(runner: Any, common: Any) -> list[int | None]:
    rows = common.num_reqs
    if hasattr(runner, "req_states"):  # the V2 runner; the batch says which of its requests each row is
        if common.req_idx is None or len(common.req_idx) < rows:
            return [None] * rows
        lengths = runner.req_states.prompt_len.np[common.req_idx[:rows]]
    else:  # the V1 runner; its rows are the batch's, save where the batch is computed in parts
        if runner.parallel_config.use_ubatching or rows < runner.input_batch.num_reqs:
            return [None] * rows
        lengths = runner.input_batch.num_prompt_tokens[:rows]
    return [int(n) for n in lengths]
