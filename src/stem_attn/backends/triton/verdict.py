"""Launch the kernels that say what an audit's rows come to: their sums, and whether these miss a target."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from stem_attn.backends.triton.launch import on_device
from stem_attn.backends.triton.verdict_kernel import sums_kernel, verdict_kernel


def add_up(found: Tensor, q_len: int) -> Tensor:
    """See `Backend.add_up`."""
    strata = found.shape[3] // 2
    cells = found[0].numel() // 2
    sums = torch.empty(7, dtype=torch.float64, device=found.device)
    with on_device(found.device):
        sums_kernel[(1,)](found, sums, cells, strata, q_len, CELLS=min(triton.next_power_of_2(cells), 1024))
    return sums


def misses(sums: Tensor, queries: int, rows: int, min_recall: float | None, max_error: float | None) -> Tensor:
    """See `Backend.misses`."""
    missed = torch.empty((), dtype=torch.bool, device=sums.device)
    recall = -1.0 if min_recall is None else min_recall
    error = math.inf if max_error is None else max_error
    with on_device(sums.device):
        verdict_kernel[(1,)](sums, missed, queries, rows, recall, error, num_warps=1)
    return missed
