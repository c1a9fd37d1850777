"""What a model's attention calls were: counted by any number of threads, and each kind logged once."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stem_attn import plots
from stem_attn.audit import Audit, AuditSums
from stem_attn.blocks import BlockSelection
from stem_attn.policy import USUAL_REASONS

log = logging.getLogger("stem_attn.hf")

MISSED = "audit missed the target"
_EXPECTED = USUAL_REASONS | {MISSED}


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
        # By layer and device, int64 [4]: what the sparse calls that missed a target, as only the device knows yet,
        # are counted with too much: calls, query tokens, causal blocks, and calls of an unknown prompt length.
        self._missed: dict[tuple[int, str], Tensor] = {}
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

    def next_audit_seed(self) -> int:
        """Return another seed on every call, and the same ones again after a reset."""
        with self._lock:
            self._audits_begun += 1
            return self._audits_begun

    def audit(self, layer: int | None, sums: AuditSums) -> None:
        """Note what an audit found of one sparse call."""
        key = _key(layer)
        with self._lock:
            self._audits[key] = self._audits[key] + sums if key in self._audits else sums

    def redone(self, layer: int | None) -> None:
        """Note a call that missed the target; `dense` notes what then ran."""
        with self._lock:
            self._redone[_key(layer)] += 1

    def sparse(
        self,
        tokens: int,
        kept: Sequence[Kept],
        *,
        unknown_prompt_len: bool,
        layer: int | None,
        missed: Literal[False] | Tensor,
    ) -> None:
        """Note one sparse call.

        Args:
            tokens: Its query tokens.
            kept: What its parts kept.
            unknown_prompt_len: Whether it has a prefix, and the whole prompt's length is unknown; warns once.
            layer: The layer's index.
            missed: bool [] on the device: whether it missed the target and was attended again, which nobody waits for.
        """
        causal = sum(k.causal for k in kept)
        too_much = None
        if missed is not False:
            numbers = torch.tensor([1, tokens, causal, int(unknown_prompt_len)], dtype=torch.int64, device="cpu")
            too_much = missed * numbers.to(missed.device, non_blocking=True)
        with self._lock:
            self._calls["sparse"] += 1
            self._tokens["sparse"] += tokens
            self._causal_blocks += causal
            self._unknown_prompt_len += unknown_prompt_len
            for blocks in (k.blocks for k in kept):
                device = str(blocks.device)
                stands = blocks if missed is False else blocks * ~missed
                self._kept_blocks[device] = self._kept_blocks.get(device, 0) + stands
            if too_much is not None:
                key = _key(layer), str(too_much.device)
                self._missed[key] = self._missed[key] + too_much if key in self._missed else too_much
        if unknown_prompt_len:
            message = "whole prompt length unknown, chunks are budgeted by the tokens seen so far: see prompt_length()"
            self._say(message, logging.WARNING)

    def banded(self, tokens: int) -> None:
        """Note one banded call of `tokens` query tokens."""
        with self._lock:
            self._calls["banded"] += 1
            self._tokens["banded"] += tokens

    def dense(self, reason: str, tokens: int) -> None:
        """Note one dense call, and log its reason if it is new for this model."""
        with self._lock:
            self._calls["dense"] += 1
            self._tokens["dense"] += tokens
            self._dense[reason] += 1
        self._say_dense(reason)

    def _say_dense(self, reason: str) -> None:
        self._say(f"dense attention: {reason}", logging.INFO if reason in _EXPECTED else logging.WARNING)

    def _say(self, message: str, level: int) -> None:
        with self._lock:
            new = message not in self._logged
            self._logged.add(message)
        if new:
            log.log(level, "%s (said once per model)", message)

    def _settle(self) -> None:
        """Count as dense what missed a target; waits for the device."""
        with self._lock:
            missed, self._missed = self._missed, {}
            for (layer, _), too_much in missed.items():
                calls, tokens, causal, unknown = too_much.tolist()
                if calls:
                    self._redone[layer] += calls
                    self._dense[MISSED] += calls
                    for counts, number in ((self._calls, calls), (self._tokens, tokens)):
                        counts["sparse"] -= number
                        counts["dense"] += number
                    self._causal_blocks -= causal
                    self._unknown_prompt_len -= unknown
            any_missed = MISSED in self._dense
        if any_missed:
            self._say_dense(MISSED)

    def stats(self, method: str) -> Stats:
        """Return the counts so far, of the method of this name; waits for the device."""
        self._settle()
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


def _key(layer: int | None) -> int:
    return -1 if layer is None else layer
