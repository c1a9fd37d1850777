"""What a model's attention calls were: counted by any number of threads, and each kind logged once."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stem_attn import plots
from stem_attn.audit import Audit, AuditSums
from stem_attn.blocks import BlockSelection
from stem_attn.policy import USUAL_REASONS

log = logging.getLogger("stem_attn.hf")

_EXPECTED = USUAL_REASONS | {"audit missed the target"}


@dataclass(frozen=True, slots=True)
class Stats:
    """Count a model's attention calls since `enable` or `reset_stats`; one layer of one forward is one call.

    Under torch.compile the calls that are dense by their form alone (decode, 4-D masks, training) leave no trace here,
    because counting them would break the graph.

    Args:
        method: The method's name.
        calls: All calls.
        sparse: Calls that attended over the blocks that the method selects.
        banded: Calls of sliding-window layers, exact over their window.
        dense: Calls left to dense attention, by reason; "no gain from sparsity" where sparse would not be faster.
        density: Kept over causal blocks, all sparse calls together, so that each call weighs as much as the
            work that dense attention would have had; None before the first sparse call.
        tokens: Query tokens by kind ("sparse", "banded", "dense"), padding included, summed over calls.
        unknown_prompt_len: Sparse calls with a prefix whose whole prompt length nobody told; their budget is that
            of the tokens seen so far.
        audit: How true the sparse calls of every layer were, by the layer's index (-1 where the model does not number
            its layers); empty without `policy.audit_rows`. It tells of sparse attempts, those that missed the policy's
            target too.
        redone: Calls that missed the target and were attended again, densely, by layer. They count as dense.
    """

    method: str
    calls: int
    sparse: int
    banded: int
    dense: dict[str, int]
    density: float | None
    tokens: dict[str, int]
    unknown_prompt_len: int
    audit: dict[int, Audit]
    redone: dict[int, int]

    def plot(self, *, axes: Any = None) -> Any:
        """Draw the calls by kind with matplotlib, dense ones by reason.

        Args:
            axes: matplotlib axes to draw into; None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        calls = {"sparse": self.sparse, "banded (sliding window)": self.banded}
        calls |= {f"dense: {reason}": count for reason, count in self.dense.items()}
        density = "nothing sparse yet" if self.density is None else f"density {self.density:.3f} of the sparse ones"
        return plots.draw_calls(calls, title=f"{self.method}: {self.calls} attention calls, {density}", axes=axes)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Hold what a selection kept, added up before anything waits for the device.

    Args:
        blocks: int64 [] on the selection's device.
        causal: Blocks that dense attention would compute.
    """

    blocks: Tensor
    causal: int

    @classmethod
    def of(cls, selection: BlockSelection) -> Kept:
        """Return a selection's."""
        batch, heads, _ = selection.counts.shape
        return cls(selection.counts.sum(), batch * heads * selection.grid.causal_blocks)


class Counters:
    """Count the calls of one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged: set[str] = set()
        self._zero()

    def _zero(self) -> None:
        self._calls: Counter[str] = Counter()
        self._dense: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._unknown_prompt_len = 0
        self._causal_blocks = 0
        self._kept_blocks: dict[str, Tensor] = {}  # by device, int64, so that counting never waits for the device
        self._audits: dict[int, AuditSums] = {}
        self._redone: Counter[int] = Counter()
        self._audits_begun = 0

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            values = ((name, value) for name, value in vars(self).items() if name != "_lock")
            return {name: value.copy() if hasattr(value, "copy") else value for name, value in values}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields, _lock=threading.Lock())

    def reset(self) -> None:
        """Forget all counts."""
        with self._lock:
            self._zero()

    def kept(self, kept: Kept) -> None:
        """Note the density of one sparse call, or of one batch row of it."""
        device = str(kept.blocks.device)
        with self._lock:
            self._kept_blocks[device] = self._kept_blocks.get(device, 0) + kept.blocks
            self._causal_blocks += kept.causal

    def next_audit_seed(self) -> int:
        """Return another seed on every call, and the same ones again after a reset."""
        with self._lock:
            self._audits_begun += 1
            return self._audits_begun

    def audit(self, layer: int | None, sums: AuditSums, *, redone: bool) -> None:
        """Note what an audit found of one sparse call, and whether it was then attended densely."""
        key = -1 if layer is None else layer
        with self._lock:
            self._audits[key] = self._audits[key] + sums if key in self._audits else sums
            self._redone.update([key] * redone)

    def unknown_prompt_len(self) -> None:
        """Note a sparse call with a prefix whose whole prompt length is unknown, and warn once."""
        with self._lock:
            self._unknown_prompt_len += 1
        message = "whole prompt length unknown, chunks are budgeted by the tokens seen so far: see prompt_length()"
        self._say(message, logging.WARNING)

    def attended(self, kind: str, tokens: int) -> None:
        """Note one sparse or banded call of `tokens` query tokens."""
        with self._lock:
            self._calls[kind] += 1
            self._tokens[kind] += tokens

    def dense(self, reason: str, tokens: int) -> None:
        """Note one dense call, and log its reason if it is new for this model."""
        with self._lock:
            self._calls["dense"] += 1
            self._tokens["dense"] += tokens
            self._dense[reason] += 1
        self._say(f"dense attention: {reason}", logging.INFO if reason in _EXPECTED else logging.WARNING)

    def _say(self, message: str, level: int) -> None:
        with self._lock:
            new = message not in self._logged
            self._logged.add(message)
        if new:
            log.log(level, "%s (said once per model)", message)

    def stats(self, method: str) -> Stats:
        """Return the counts so far, of the method of this name."""
        with self._lock:
            kept = sum(int(n) for n in self._kept_blocks.values())
            return Stats(
                method=method,
                calls=self._calls.total(),
                sparse=self._calls["sparse"],
                banded=self._calls["banded"],
                dense=dict(self._dense),
                density=kept / self._causal_blocks if self._causal_blocks else None,
                tokens={kind: self._tokens[kind] for kind in ("sparse", "banded", "dense")},
                unknown_prompt_len=self._unknown_prompt_len,
                audit={layer: self._audits[layer].read() for layer in sorted(self._audits)},
                redone=dict(sorted(self._redone.items())),
            )
