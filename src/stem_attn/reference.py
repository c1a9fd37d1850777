"""Stem in float64, token by token: the oracle that every fast path is measured against.

Written for the reader, not for speed. It materialises the full attention matrix of a head, loops over rows in Python,
and shares nothing with the fast path but the config and the block geometry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig


def reference_stem(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, scale: float, prompt_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run the whole method: score, budget, select, attend.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        config: The method.
        scale: Factor of the logits.
        prompt_len: Tokens of the whole prompt; default Tk.

    Returns:
        out float64 [B, Hq, Tq, Dv], and the kept blocks, bool [B, Hq, Qb, Kb].
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    scores = reference_scores(q, k, v, config, scale=scale)
    budget = reference_budget(config, prompt_len or grid.k_len)[grid.first_block :]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        kept = reference_row(scores[b, h, row].tolist(), budget[row], grid.first_block + row, config)
        mask[b, h, row, kept] = True
    out, _ = reference_attention(q, k, v, mask, config.block_size, scale=scale)
    return out, mask


def reference_scores(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, scale: float) -> Tensor:
    """Score block pairs from token pairs: float64 [B, Hq, Qb, Kb].

    The routing logit of a block pair is the sum of `scale * q_i.k_j` over the pairs with
    `i % stride + j % stride == stride - 1`, over the `block_size^2 / stride` such pairs that two whole blocks have.
    """
    size, stride = config.block_size, config.stride
    grid = BlockGrid(q.shape[2], k.shape[2], size)
    q_pos = torch.arange(grid.offset, grid.k_len)
    k_pos = torch.arange(grid.k_len)
    antidiagonal = (q_pos[:, None] % stride + k_pos % stride) == stride - 1
    in_row = (q_pos // size == grid.block_ids()[:, None]).double()  # [Qb, Tq]
    in_column = (k_pos // size == torch.arange(grid.k_blocks)[:, None]).double()  # [Kb, Tk]
    group_size = q.shape[1] // k.shape[1]
    scores = torch.empty(*q.shape[:2], grid.q_blocks, grid.k_blocks, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = q[b, h].double() @ k[b, h // group_size].double().T * scale
            pair_sums = in_row @ (logits * antidiagonal) @ in_column.T
            magnitude = _value_term(v[b, h // group_size].double().norm(dim=-1), config, grid)
            scores[b, h] = pair_sums / (size * size / stride) + config.value_weight * magnitude
    return scores


def _value_term(norms: Tensor, config: StemConfig, grid: BlockGrid) -> Tensor:
    """What each key block's value norms [Tk] add to its score: [Kb]."""
    size, stride = config.block_size, config.stride
    term = torch.zeros(grid.k_blocks, dtype=torch.float64)
    if config.value_term == "log":
        for j in range(grid.k_blocks):
            term[j] = max(0.0, math.log(max(norms[j * size : (j + 1) * size].max().item(), 1e-300)))
    elif config.value_term == "zscore":
        whole = grid.k_len // stride  # groups; a rest of fewer than `stride` tokens has no z-score
        logs = torch.tensor([math.log(norms[g * stride : (g + 1) * stride].max() + 1e-6) for g in range(whole)])
        if whole >= 2:
            z = (logs - logs.mean()) / (logs.std() + 1e-6)
            for g in range(whole):
                term[g * stride // size] += max(0.0, z[g].item()) / (size // stride)
    return term


def reference_budget(config: StemConfig, prompt_len: int) -> list[int]:
    """Blocks that each row of the whole prompt may keep, not yet clipped to its causal blocks."""
    n = math.ceil(prompt_len / config.block_size)
    if prompt_len < config.min_seq_len or n < config.dense_below:
        return [n] * n
    start = config.ratio(n) * n + config.budget_bias
    if config.decay_from == "first_row":
        rows = [math.floor(start - start * (1 - config.decay) / n * i) for i in range(n)]
    else:
        plateau = min(max(int(start), config.budget_floor), n)
        falling = torch.linspace(plateau, config.decay * plateau, n - plateau, dtype=torch.float64)
        rows = [plateau] * plateau + [math.floor(x) for x in falling.tolist()]
    rows = [min(max(kept, config.budget_floor), n) for kept in rows]
    return [n if n - i <= config.tail_blocks else kept for i, kept in enumerate(rows)]


def reference_row(scores: list[float], budget: int, block: int, config: StemConfig) -> list[int]:
    """Return the key blocks that the query block numbered `block` keeps, in ascending order."""
    causal = range(block + 1)
    forced = {j for j in causal if j < config.sink_blocks or j > block - config.local_blocks}
    best_first = sorted(causal, key=lambda j: (-scores[j], j))
    if config.forced_blocks == "on_top":
        return sorted(forced.union(best_first[:budget]))
    chosen = [j for j in best_first if j not in forced]
    return sorted(forced.union(chosen[: max(0, budget - len(forced))]))


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, *, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute causal attention over kept blocks by masking the full matrix.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        mask: Kept blocks, bool [B, Hq, Qb, Kb].
        block_size: Tokens a block.
        scale: Factor of the logits.
        window: Tokens of a causal sliding window, or None.

    Returns:
        out float64 [B, Hq, Tq, Dv] and the natural log-sum-exp float64 [B, Hq, Tq].
    """
    grid = BlockGrid(q.shape[2], k.shape[2], block_size)
    q_pos = torch.arange(grid.offset, grid.k_len)[:, None]
    k_pos = torch.arange(grid.k_len)
    visible = (k_pos <= q_pos) & (k_pos > q_pos - (window or grid.k_len))
    group_size = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.empty(q.shape[:3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kept = mask[b, h].cpu()[q_pos // block_size - grid.first_block, k_pos // block_size]
            logits = q[b, h].double() @ k[b, h // group_size].double().T * scale
            logits = logits.cpu().masked_fill(~(visible & kept), -torch.inf)
            lse[b, h] = logits.logsumexp(-1)
            out[b, h] = logits.softmax(-1) @ v[b, h // group_size].double().cpu()
    return out, lse
