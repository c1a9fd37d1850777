"""What audits found in this process, by layer: sums that nobody waits for. Workers count apart from one another.

The same numbers go to Prometheus, as sums too, so that those of workers add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stem_attn.audit import AuditSums, Estimate
from stem_attn.integrations.vllm.late import Late

_UNNUMBERED = -1  # where vLLM's name of a layer does not say which it is


class Audits:
    """Add up audits of layers' calls."""

    def __init__(self) -> None:
        self._begun = 0
        # A worker has one device. What it holds is added up once a step, by few launches.
        self._waiting: list[tuple[int, AuditSums, int, Tensor]] = []
        self._added = 0
        # Of layers, float64: queries, rows, tokens; tokens and calls attended again; `AuditSums.values`.
        self._table: Tensor | None = None
        self._places: dict[int, int] = {}  # of layers in it
        self._late = Late()

    def next_seed(self) -> int:
        """Return another seed on every call."""
        self._begun += 1
        return self._begun

    def add(self, layer: int | None, sums: AuditSums, tokens: int, redone: Tensor) -> None:
        """Note the audit of one call.

        Args:
            layer: The layer's index; None: it has none.
            sums: What the audit found.
            tokens: The call's.
            redone: bool [] on the sums' device: whether it was attended again.
        """
        self._waiting.append((_UNNUMBERED if layer is None else layer, sums, tokens, redone))
        if not sums.values.is_cuda:
            self._add_up()

    def show(self) -> None:
        """Give the metrics page what has arrived on the host."""
        self._add_up()
        if self._table is not None and self._table.is_cuda:
            new = self._late.read(self._table, self._added)
            if new is not None:
                _show(list(self._places)[: len(new[0])], new[0])  # later layers have not arrived yet

    def _add_up(self) -> None:
        if not self._waiting:
            return
        layers, sums, tokens, redone = zip(*self._waiting, strict=True)
        self._waiting.clear()
        self._added += len(layers)
        device = sums[0].values.device
        known = [(one.queries, one.rows, n, 1) for one, n in zip(sums, tokens, strict=True)]
        sizes = torch.tensor(known, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
        again = torch.stack(redone)[:, None] * sizes[:, 2:]
        values = torch.stack([one.values for one in sums])
        # Of activations that are no numbers an audit says nothing, and what is added to them would be none either.
        there = values.isfinite().all(1, keepdim=True)
        found = torch.cat((sizes[:, :3] * there, again, values.where(there, 0.0)), 1)
        places = [self._places.setdefault(layer, len(self._places)) for layer in layers]
        at = torch.tensor(places, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
        self._table = _grown(self._table, len(self._places), found)
        self._table.index_add_(0, at, found)
        if not found.is_cuda:
            _show(layers, found)

    def read(self) -> dict[str, Any]:
        """Return what was found so far as plain values; waits for the device.

        Returns:
            `audit`: of every layer `recall` and `error`, each as a value and its lower and upper limit, and how many
            `rows` were sampled; calls whose audit is no number are left out. `redone` and `redone_tokens`: calls that
            missed the target and were attended again, and their tokens, of layers that have any.
        """
        self._add_up()
        audit, redone, redone_tokens = {}, {}, {}
        table = [] if self._table is None else self._table.tolist()
        for layer, place in sorted(self._places.items()):
            queries, rows, _, tokens_again, calls_again, *values = table[place]
            if queries:
                sums = AuditSums(int(queries), int(rows), torch.tensor(values, dtype=torch.float64, device="cpu"))
                found = sums.read()
                audit[layer] = {"recall": _plain(found.recall), "error": _plain(found.error), "rows": found.rows}
            if calls_again:
                redone[layer], redone_tokens[layer] = int(calls_again), int(tokens_again)
        return {"audit": audit, "redone": redone, "redone_tokens": redone_tokens}


def _grown(table: Tensor | None, layers: int, like: Tensor) -> Tensor:
    """Return a table with a row for each of some layers, and what an older one holds."""
    if table is not None and len(table) == layers:
        return table
    with torch.inference_mode(False):  # so that it can be added to in any mode
        larger = torch.zeros(layers, like.shape[1], dtype=like.dtype, device=like.device)
        if table is not None:
            larger[: len(table)] = table
    return larger


def _plain(estimate: Estimate) -> list[float | None]:
    # Of activations near the largest numbers an interval is none, which JSON cannot say.
    return [x if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high)]


def _show(layers: Sequence[int], rows: Tensor) -> None:
    """Add to the metrics what rows of the table have more than before; float64 [n, columns] on the host."""
    metrics = _metrics()
    for layer, (queries, _, tokens, tokens_again, _, recall, _, _, lost, power, *_) in zip(
        layers, rows.tolist(), strict=True
    ):
        mean = recall / queries if queries else 0.0
        amounts = {"tokens": tokens, "recall": mean * tokens, "lost": lost, "power": power, "redone": tokens_again}
        for name, amount in amounts.items():
            metrics[name].labels(str(layer)).inc(max(amount, 0.0))  # a difference of sums may be off by rounding


@cache
def _metrics() -> dict[str, Any]:
    """Make the Prometheus counters, at first use; see `counters._metrics`."""
    from prometheus_client import Counter as Metric

    def by_layer(name: str, text: str) -> Any:
        return Metric(name, text, ["layer"])

    return {
        "tokens": by_layer("stem_audit_tokens", "Tokens of audited sparse attention"),
        "recall": by_layer("stem_audit_recall", "Recall of audited sparse attention, summed over its tokens"),
        "lost": by_layer("stem_audit_lost_power", "Square of what sparse attention's output is off, by audits"),
        "power": by_layer("stem_audit_power", "Square of exact attention's output, by audits"),
        "redone": by_layer("stem_redone_tokens", "Tokens whose sparse attention missed the target, and was made again"),
    }
