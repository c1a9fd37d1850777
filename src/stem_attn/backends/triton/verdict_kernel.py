"""The kernels that say what an audit's rows come to. They compute what `exact_rows.add_up` and `AuditSums.read` do."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["cells", "strata", "q_len"])
def sums_kernel(
    found,  # float32 [3, B, Hq, R] contiguous: of every row the kept share, the lost and the whole power
    sums,  # float64 [7], see `AuditSums`
    cells,  # B * Hq * R / 2
    strata,  # R / 2
    q_len,
    CELLS: tl.constexpr,  # taken at once, a power of two
):
    """Add up all cells of two rows; one program."""
    nothing = tl.zeros([CELLS], tl.float64)
    recall, lost, power = nothing, nothing, nothing
    for start in range(0, cells, CELLS):
        recall += _cells(found, start, cells, strata, q_len, CELLS, 1.0)
        lost += _cells(found + 2 * cells, start, cells, strata, q_len, CELLS, 1.0)
        power += _cells(found + 4 * cells, start, cells, strata, q_len, CELLS, 1.0)
    all_lost, all_power = tl.sum(lost), tl.sum(power)
    ratio = all_lost / all_power
    variance, squares, lost_variance, lost_squares = nothing, nothing, nothing, nothing
    for start in range(0, cells, CELLS):
        spread = _cells(found, start, cells, strata, q_len, CELLS, -1.0)
        spread = _square(spread)
        variance += spread
        squares += spread * spread
        spread = _cells(found + 2 * cells, start, cells, strata, q_len, CELLS, -1.0)
        spread = _square(spread - ratio * _cells(found + 4 * cells, start, cells, strata, q_len, CELLS, -1.0))
        lost_variance += spread
        lost_squares += spread * spread
    tl.store(sums, tl.sum(recall))
    tl.store(sums + 1, tl.sum(variance))
    tl.store(sums + 2, tl.sum(squares))
    tl.store(sums + 3, all_lost)
    tl.store(sums + 4, all_power)
    tl.store(sums + 5, tl.sum(lost_variance))
    tl.store(sums + 6, tl.sum(lost_squares))


@triton.jit
def _cells(numbers, start, cells, strata, q_len, CELLS: tl.constexpr, SIGN: tl.constexpr):
    """Return half of both rows' sum or difference, times the queries that the cell stands for: float64 [CELLS]."""
    cell = start + tl.arange(0, CELLS)
    real = cell < cells
    stratum = (cell % strata).to(tl.int64)
    size = (stratum + 1) * q_len // strata - stratum * q_len // strata
    one = tl.load(numbers + 2 * cell, mask=real, other=0.0).to(tl.float64)
    other = tl.load(numbers + 2 * cell + 1, mask=real, other=0.0).to(tl.float64)
    return (one + SIGN * other) * (size.to(tl.float64) / 2)


@triton.jit
def _square(x):
    """Return the square; of what is no number, 0."""
    return tl.where(x == x, x * x, 0.0)


@triton.jit(do_not_specialize=["queries", "rows"])
def verdict_kernel(
    sums,  # float64 [7], see `AuditSums`
    missed,  # bool []
    queries,
    rows,
    min_recall,  # negative: none
    max_error,  # infinite: none
):
    """Tell whether the limits of both estimates fail to show what is asked for; one program."""
    whole, sampled = queries.to(tl.float64), rows.to(tl.float64)
    share = tl.load(sums) / whole
    half = _half_width(tl.load(sums + 1), tl.load(sums + 2), whole, sampled)
    low = tl.where(share > 1, 1.0, share) - half
    recalls = tl.where(low < 0, 0.0, low) >= min_recall
    power = tl.load(sums + 4)
    half = _half_width(tl.load(sums + 5), tl.load(sums + 6), power, sampled)
    high = tl.where(power == 0, 0.0, tl.sqrt(tl.load(sums + 3) / power + half))
    errs = (high <= max_error) | (max_error == float("inf"))
    # Asked this way round, a limit that is no number misses.
    tl.store(missed, ((min_recall >= 0) & (recalls == 0)) | (errs == 0))


@triton.jit
def _half_width(variance, squares, whole, rows):
    """Return half the width of a 95% interval of a share; see `audit._half_width`."""
    guard = (whole / rows) * (whole / rows)
    total = variance + guard
    freedom = total * total / (squares + guard * guard)
    one = 1 / tl.where(freedom < 2, 2.0, freedom)
    # Student's t, as in `audit._t_quantile`.
    t = 1.959964 + one * (2.3722713 + one * (2.8224987 + one * 2.5558498))
    return t * tl.sqrt(total) / whole
