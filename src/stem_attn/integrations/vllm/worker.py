"""What `collective_rpc` can ask a worker, with `--worker-extension-cls` naming the class below."""

from __future__ import annotations

from typing import Any

from stem_attn.integrations.vllm.counters import counters


class StemWorkerExtension:
    """Methods that vLLM adds to its workers."""

    def stem_stats(self) -> dict[str, Any]:
        """Return what Stem did in this worker; see `Counters.read`."""
        return counters.read()

    def stem_reset_stats(self) -> None:
        """Start counting anew."""
        counters.reset()
