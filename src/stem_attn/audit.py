"""How true a sparse prefill was: a few sampled query rows are attended exactly and compared with what came out.

Every head has sampled rows of its own, two in each of equal stretches of the call's queries. The two of a cell differ
by chance alone, so their difference tells the error of the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.exact_rows import add_up as add_up_rows
from stem_attn.exact_rows import compare_rows, strata
from stem_attn.layout import Part

_QUERIES_A_CELL = 128  # at least, so that no more than one query of 64 is sampled and short chunks cost little
_LEAST_FREEDOM = 2.0

CompareRows = Callable[[Call, Part, BlockSelection, Tensor, Tensor], Tensor]
AddUp = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold an estimate and its 95% interval.

    Args:
        value: The estimate.
        low: Lower limit.
        high: Upper limit.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Audit:
    """Say how close a layer's sparse attention came to the exact one, estimated from sampled query rows.

    Args:
        recall: Share of the exact attention probability that falls on kept blocks, mean over heads and queries. What
            sinks take is no part of it.
        error: `|O_sparse - O| / |O|` over all heads and queries, before the output projection.
        rows: Query rows of single heads that were sampled.
    """

    recall: Estimate
    error: Estimate
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class AuditSums:
    """Hold what an audit found as sums, so that those of calls add up and nothing waits for a device.

    Args:
        queries: Queries that the rows stand for, heads multiplied in.
        rows: Sampled rows, heads multiplied in.
        values: float64 [7] on the call's device: recall, its variance and the squares of the cells' variances; lost
            and whole power of the output; variance and squared variances of the lost one, with the power's part in it.
    """

    queries: int
    rows: int
    values: Tensor

    def __add__(self, other: AuditSums) -> AuditSums:
        """Return the sums of both."""
        values = self.values + other.values.to(self.values.device)
        return AuditSums(self.queries + other.queries, self.rows + other.rows, values)

    def read(self) -> Audit:
        """Return the estimates; waits for the device."""
        recall, variance, squares, lost, power, lost_variance, lost_squares = self.values.tolist()
        half = _half_width(variance, squares, self.queries, self.rows)
        value = min(recall / self.queries, 1.0)  # rounding
        found = Estimate(value, max(value - half, 0.0), min(value + half, 1.0))
        if not power:
            return Audit(found, Estimate(0.0, 0.0, 0.0), self.rows)
        half = _half_width(lost_variance, lost_squares, power, self.rows)
        ratio = lost / power
        low, high = math.sqrt(max(ratio - half, 0.0)), math.sqrt(ratio + half)
        return Audit(found, Estimate(math.sqrt(ratio), low, high), self.rows)


def rows_to_show(lost: float) -> int:
    """Return how many sampled rows it takes at least to show that no more than a share is lost."""
    return math.ceil(_t_quantile(_LEAST_FREEDOM) / lost)


def audit(
    call: Call,
    selections: Sequence[BlockSelection],
    out: Tensor,
    *,
    rows: int,
    seed: int,
    compare: CompareRows = compare_rows,
    add_up: AddUp = add_up_rows,
) -> AuditSums:
    """Attend exactly with some query rows, and compare with what was kept and what came out.

    Nothing is asked back from the device, and no global random state is touched.

    Args:
        call: The call. Of a backend's answer, only what it kept and gave is looked at.
        selections: The kept blocks of every part.
        out: [B, Hq, T, Dv], the call's output.
        rows: Rows of single heads to sample of every sequence, shared evenly by the heads. A head has at least two, and
            beyond that no more than one for 64 queries.
        seed: Decides which rows; calls whose sums are added should differ in it.
        compare: Attends exactly with the sampled rows; a backend's `compare_rows`.
        add_up: Adds up what that found; a backend's `add_up`.

    Returns:
        The sums over all parts.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    parts = zip(call.parts, selections, strict=True)
    first, *others = (
        _audit_part(call, part, kept, out[:, :, part.tokens], rows, generator, compare, add_up) for part, kept in parts
    )
    return sum(others, first)


def _audit_part(
    call: Call,
    part: Part,
    selection: BlockSelection,
    out: Tensor,
    rows: int,
    generator: torch.Generator,
    compare: CompareRows,
    add_up: AddUp,
) -> AuditSums:
    batch, heads = part.q.shape[:2]
    count = max(min(-(-rows // (2 * heads)), part.q_len // _QUERIES_A_CELL), 1)
    edges = strata(part.q_len, count)
    drawn = torch.rand(batch, heads, count, 2, generator=generator, dtype=torch.float64, device="cpu")
    places = (edges[:-1, None] + (drawn * edges.diff()[:, None]).long()).flatten(2)
    found = compare(call, part, selection, out, places.to(part.q.device, non_blocking=True))
    return AuditSums(batch * heads * part.q_len, batch * heads * count * 2, add_up(found, part.q_len))


def _half_width(variance: float, squares: float, whole: float, rows: int) -> float:
    """Return half the width of a 95% interval of a share.

    Student's t over cells of two rows, with Satterthwaite's degrees of freedom. One cell more is assumed that lost one
    of its rows wholly: what no sample has shown may still be there. Where rows are kept or lost wholly, that gives
    about the limits of Clopper and Pearson.

    Of numbers too large or too small to be squared it is no number.

    Args:
        variance: Of the sum, from the cells.
        squares: Sum of the squares of the cells' variances.
        whole: What the sum is a share of.
        rows: Sampled rows.
    """
    guard = (whole / rows) * (whole / rows)  # not a power, which raises where a product is infinite
    total = variance + guard
    square, below = total * total, squares + guard * guard
    freedom = square / below if below else square * math.inf
    return _t_quantile(max(freedom, _LEAST_FREEDOM)) * math.sqrt(total) / whole


def _t_quantile(freedom: float) -> float:
    """Return the 97.5% quantile of Student's t. Source: Abramowitz and Stegun, 26.7.5; 3% low at 2, 1% at 3."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
