"""The Output-Aware Metric: a score for every (query block, key block) pair.

The routing logit is the mean, over a block pair, of antidiagonal dot products with a stride. That mean is linear
in q and in k, so it factorises: average the tokens of a block by their position modulo the stride, pair query group
g with key group `stride - 1 - g`, and the score is one dot product of length `stride * D`. Scoring therefore reads
q, k and v once and multiplies matrices of `n` rows; nothing of size `(T / stride)^2` exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig


def block_scores(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float) -> Tensor:
    """Score every key block for every query block.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        config: Reads `block_size`, `stride`, `value_term` and `value_weight`.
        scale: Factor of the attention logits, usually `1 / sqrt(D)`.

    Returns:
        float32 [B, Hq, Qb, Kb] in natural-log units. Blocks of the future have scores too: selection ignores them.

    Source: Stem, Eq. 7; the pairing of positions is XAttention's antidiagonal.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    batch, kv_heads = k.shape[:2]
    q_groups = _group_means(q, grid.offset % config.block_size, config)
    k_groups = _group_means(k, 0, config).flip(3)  # query group g meets key group stride - 1 - g
    # The query heads of one KV head are rows of one matrix product: K is never repeated.
    rows = q_groups.reshape(batch, kv_heads, -1, config.stride * q.shape[3])
    scores = rows @ k_groups.flatten(3).transpose(2, 3)
    scores = scores.mul_(scale / config.stride).view(batch, q.shape[1], grid.q_blocks, grid.k_blocks)
    if config.value_term == "none":
        return scores
    bonus = _log_term(v, config) if config.value_term == "log" else _zscore_term(v, config)
    per_query_head = bonus.repeat_interleave(q.shape[1] // kv_heads, dim=1)
    return scores.add_(per_query_head[:, :, None, :], alpha=config.value_weight)


def _group_means(x: Tensor, lead: int, config: StemConfig) -> Tensor:
    """Average the tokens of each block by position modulo the stride.

    Tokens that a partial block lacks count as zeros, as in the official code.

    Args:
        x: [B, H, T, D].
        lead: Tokens of the first block that precede x.
        config: Reads `block_size` and `stride`.

    Returns:
        float32 [B, H, blocks, stride, D].
    """
    batch, heads, length, dim = x.shape
    size, stride = config.block_size, config.stride
    means = torch.empty(batch, heads, -(-(lead + length) // size), stride, dim, device=x.device)

    def write(first: int, tokens: Tensor) -> None:
        groups = torch.unflatten(tokens, 2, (-1, size // stride, stride)).sum(3, dtype=torch.float32)
        means[:, :, first : first + groups.shape[2]] = groups

    # Partial blocks are padded on their own, so that x is never copied whole.
    head = min(-lead % size, length)
    if head:
        write(0, F.pad(x[:, :, :head], (0, 0, lead, size - lead - head)))
    whole = (length - head) // size * size
    first = 1 if lead else 0
    if whole:
        write(first, x[:, :, head : head + whole])
    tail = length - head - whole
    if tail:
        write(first + whole // size, F.pad(x[:, :, head + whole :], (0, 0, 0, size - tail)))
    return means.mul_(stride / size)


def _log_term(v: Tensor, config: StemConfig) -> Tensor:
    """Largest `max(0, log |v|)` of each key block: float32 [B, Hkv, Kb]."""
    norms = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
    padded = F.pad(norms, (0, -norms.shape[-1] % config.block_size))
    largest: Tensor = torch.unflatten(padded, -1, (-1, config.block_size)).amax(-1)
    logs: Tensor = largest.clamp_(min=1).log_()
    return logs


def _zscore_term(v: Tensor, config: StemConfig) -> Tensor:
    """Block means of the rectified z-score of log magnitude over the sequence: float32 [B, Hkv, Kb].

    Only whole groups of `stride` tokens count; the rest of the last block counts as zeros.
    """
    norms = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
    groups = norms.shape[-1] // config.stride
    if groups < 2:  # no deviation to speak of
        return torch.zeros(*norms.shape[:2], -(-norms.shape[-1] // config.block_size), device=v.device)
    whole = norms[..., : groups * config.stride]
    logs = (torch.unflatten(whole, -1, (groups, config.stride)).amax(-1) + 1e-6).log_()
    std, mean = torch.std_mean(logs, dim=-1, keepdim=True)
    z: Tensor = ((logs - mean) / (std + 1e-6)).clamp_(min=0)
    per_block = config.block_size // config.stride
    blocks = -(-norms.shape[-1] // config.block_size)
    padded = F.pad(z, (0, blocks * per_block - groups))
    block_means: Tensor = torch.unflatten(padded, -1, (blocks, per_block)).mean(-1)
    return block_means
