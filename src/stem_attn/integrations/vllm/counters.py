"""What Stem did in this process: tokens by reason, density, time in selection, audits.

Workers count apart from one another. The same numbers go to Prometheus. vLLM's metrics page shows those of other
processes with several API servers, or where `PROMETHEUS_MULTIPROC_DIR` was set before the server started; see
docs/serving.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stem_attn.integrations.vllm.audits import Audits
from stem_attn.integrations.vllm.late import Late


class Counters:
    """Count tokens and kept blocks. A token counts once in every attention layer that it passes through."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all counts; Prometheus keeps its own."""
        self._sparse_tokens = 0
        self._dense_tokens: Counter[str] = Counter()
        self._unknown_prompt_len_tokens = 0
        self._selection_seconds = 0.0
        self._selections = 0
        self._kept_blocks = 0
        self._causal_blocks = 0
        # A worker has one GPU. What it holds is added up once a step, by few launches, and nobody waits for it.
        self._waiting: list[Tensor] = []
        self._waiting_causal = 0
        self._kept_on_gpu: Tensor | None = None  # int64 [1]
        self._late = Late()
        self.audits = Audits()

    def count_step(self, sparse: int, dense: Mapping[str, int], unknown_prompt_len: int) -> None:
        """Note the tokens of one step, layers multiplied in.

        Args:
            sparse: Tokens that attend sparsely.
            dense: Tokens left to the dense parent, by reason.
            unknown_prompt_len: Those of the sparse ones whose whole prompt length nobody told.
        """
        self._sparse_tokens += sparse
        self._dense_tokens.update(dense)
        self._unknown_prompt_len_tokens += unknown_prompt_len
        self._add_up()
        metrics = _metrics()
        if sparse:
            metrics["tokens"].labels("sparse", "").inc(sparse)
        for reason, tokens in dense.items():
            metrics["tokens"].labels("dense", reason).inc(tokens)
        new = None if self._kept_on_gpu is None else self._late.read(self._kept_on_gpu, self._causal_blocks)
        if new is not None:
            metrics["kept"].inc(int(new[0]))
            metrics["causal"].inc(new[1])
        self.audits.show()

    def count_blocks(self, counts: Tensor, causal_blocks: int) -> None:
        """Note what one layer kept for one span.

        Args:
            counts: int32 [1, Hq, Qb]; kept blocks.
            causal_blocks: What a head would keep at most.
        """
        causal = counts.shape[1] * causal_blocks
        if counts.is_cuda:
            self._waiting.append(counts)
            self._waiting_causal += causal
            return
        kept = int(counts.sum())
        self._selections += 1
        _metrics()["selections"].inc()
        self._kept_blocks += kept
        self._causal_blocks += causal
        _metrics()["kept"].inc(kept)
        _metrics()["causal"].inc(causal)

    def count_selection_seconds(self, seconds: float) -> None:
        """Note time spent choosing blocks."""
        self._selection_seconds += seconds
        _metrics()["seconds"].inc(seconds)

    def _add_up(self) -> None:
        if not self._waiting:
            return
        if self._kept_on_gpu is None:
            with torch.inference_mode(False):  # so that it can be added to in any mode
                self._kept_on_gpu = torch.zeros(1, dtype=torch.int64, device=self._waiting[0].device)
        # In place: a copy of it may be under way.
        self._kept_on_gpu += torch.cat([counts.flatten() for counts in self._waiting]).sum()
        self._causal_blocks += self._waiting_causal
        self._selections += len(self._waiting)
        _metrics()["selections"].inc(len(self._waiting))
        self._waiting.clear()
        self._waiting_causal = 0

    def read(self) -> dict[str, Any]:
        """Return the counts so far, as plain values. Calls that were attended again count as the sparse ones before."""
        self._add_up()
        kept = self._kept_blocks + (0 if self._kept_on_gpu is None else int(self._kept_on_gpu))
        return {
            "sparse_tokens": self._sparse_tokens,
            "dense_tokens": dict(self._dense_tokens),
            "unknown_prompt_len_tokens": self._unknown_prompt_len_tokens,
            "density": kept / self._causal_blocks if self._causal_blocks else None,
            "selections": self._selections,
            "selection_seconds": self._selection_seconds,
            **self.audits.read(),
        }


counters = Counters()


@cache
def _metrics() -> dict[str, Any]:
    """Make the Prometheus counters, at first use: the client decides by the environment where they live."""
    from prometheus_client import Counter as Metric

    return {
        "tokens": Metric("stem_tokens", "Tokens by attention, summed over layers", ["attention", "reason"]),
        "kept": Metric("stem_kept_blocks", "Key blocks kept by sparse attention"),
        "causal": Metric("stem_causal_blocks", "Key blocks that dense attention would have read in their place"),
        "selections": Metric("stem_selections", "Sparse calls of layers, one a prompt or chunk"),
        "seconds": Metric("stem_selection_seconds", "Seconds spent choosing key blocks"),
    }
