"""Pruned blocks return through their means (`residual="mean"`), in plain torch on any device.

A pruned past block of n tokens joins the softmax of a query q as if each of its tokens had the block's mean key and
mean value: with the weight `n * exp(scale * q . mean(k))` and the value `mean(v)`. Means are rounded to the inputs'
dtype, as if they were keys and values themselves, which matrix units can take. What the kept blocks gave is merged
with that through its log-sum-exp, so a row that prunes nothing keeps its numbers to the bit. That log-sum-exp includes
the head's sink, if there is one: so the sink counts once.

A pruned block lies before its query's own block, so it is whole and visible to all of the query's row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_attn.blocks import BlockSelection

# Logits of a tile: all query heads of a KV head, as many rows of query blocks as fit, at least one.
_TILE_LOGITS = 2**21


def add_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    out: Tensor,
    lse: Tensor,
    *,
    means_dtype: torch.dtype,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Add the pruned past blocks, as their means, to attention over the kept ones.

    Computes in float32 (float64 for float64 inputs), tile by tile.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        selection: The kept blocks.
        out: [B, Hq, Tq, Dv], attention over the kept blocks; changed in place.
        lse: float32 [B, Hq, Tq], the natural log-sum-exp of their logits; changed in place.
        means_dtype: What means are rounded to, the dtype of the call's own inputs: these may have been widened.
        scale: Factor of the logits.
        softcap: What their magnitude stays below; a mean's logit too, before it counts its tokens. None: no softcap.
    """
    grid, size = selection.grid, selection.block_size
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    whole = grid.k_len // size
    rows = max(1, _TILE_LOGITS // max(group * size * whole, 1))
    for b in range(q.shape[0]):
        for kv_head in range(k.shape[1]):
            k_means, v_means = (
                torch.unflatten(x[b, kv_head, : whole * size], 0, (whole, size))
                .mean(1, dtype=compute)
                .to(means_dtype)
                .to(compute)
                for x in (k, v)
            )
            heads = slice(kv_head * group, (kv_head + 1) * group)
            # A row of a tile meets blocks of its future with the weight 0, and 0 x NaN is NaN: then one row a tile.
            step = rows if bool(k_means.isfinite().all() & v_means.isfinite().all()) else 1
            for start in range(0, grid.q_blocks, step):
                stop = min(start + step, grid.q_blocks)
                past = grid.first_block + stop - 1  # blocks before the last row's own
                tokens = slice(grid.q_span(start)[0], grid.q_span(stop - 1)[1])
                block = _arange(tokens.start + grid.offset, tokens.stop + grid.offset, q.device) // size
                logits = _prior(selection, b, heads, start, stop, past, compute)[:, block - block[0]]
                queries = q[b, heads, tokens].to(compute)
                keys = k_means[:past].mT.expand(group, -1, -1)
                if softcap is None:
                    logits.baddbmm_(queries, keys, alpha=scale)
                else:
                    logits.add_((queries @ keys).mul_(scale / softcap).tanh_(), alpha=softcap)
                kept = lse[b, heads, tokens].to(compute)
                total = torch.logaddexp(kept, logits.logsumexp(-1))
                weights = logits.sub_(total[..., None]).exp_()
                share = (kept - total).exp_()[..., None]
                merged = out[b, heads, tokens].to(compute).mul_(share).add_(weights @ v_means[:past])
                out[b, heads, tokens] = merged.to(out.dtype)
                lse[b, heads, tokens] = total.to(lse.dtype)


def _prior(
    selection: BlockSelection, b: int, heads: slice, start: int, stop: int, past: int, dtype: torch.dtype
) -> Tensor:
    """Return what a block's weight adds to its logit: log n for the pruned past blocks of a row, -inf for the others.

    Args:
        selection: The kept blocks.
        b: Batch row.
        heads: Query heads.
        start: First row.
        stop: One past the last row.
        past: Columns: the blocks before the last row's own.
        dtype: Of the result.

    Returns:
        [heads, rows, past].
    """
    indices, counts = selection.indices[b, heads, start:stop], selection.counts[b, heads, start:stop, None]
    device = indices.device
    columns = _arange(0, past + 1, device)
    own = selection.grid.first_block + _arange(start, stop, device)
    shape = (len(indices), stop - start, past + 1)
    prior = torch.full(shape, math.log(selection.block_size), dtype=dtype, device=device)
    prior.masked_fill_(columns >= own[:, None], -math.inf)
    # What stands past a count, and blocks that are nobody's past in these rows, land in one extra column.
    valid = _arange(0, indices.shape[-1], device) < counts
    slots = indices.where(valid, past).clamp(max=past).long()
    return prior.scatter_(-1, slots, -math.inf)[..., :past]


def _arange(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int64, device=device)
