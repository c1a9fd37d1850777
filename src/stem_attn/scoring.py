"""The Output-Aware Metric: a score for every (query block, key block) pair.

The linear routing logit is the mean, over a block pair, of antidiagonal dot products with a stride. That mean is linear
in q and in k, so it factorises: average the tokens of a block by their position modulo the stride, pair query group
g with key group `stride - 1 - g`, and the score is one dot product of length `stride * D`. Scoring therefore reads
q, k and v once and multiplies matrices of `n` rows.

The mass estimate is a softmax over means of short runs of tokens. It is made tile by tile, so that nothing of size
`(T / stride)^2` exists either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig

# Logits of a tile of query blocks, all heads together: 64 MiB.
_TILE_LOGITS = 2**24


def block_scores(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float) -> Tensor:
    """Score every key block for every query block.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        config: Reads `block_size`, `score`, `stride`, `spread_weight`, `value_term` and `value_weight`.
        scale: Factor of the attention logits, usually `1 / sqrt(D)`.

    Returns:
        float32 [B, Hq, Qb, Kb] in natural-log units. Blocks of the future have scores too (-inf where the estimate is
        of mass): selection ignores them.

    Source: Stem, Eq. 7; the pairing of positions is XAttention's antidiagonal.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    estimate = _linear if config.score == "linear" else _mass
    scores = estimate(q, k, grid, config, scale)
    if config.value_term == "none":
        return scores
    bonus = _log_term(v, config) if config.value_term == "log" else _zscore_term(v, config)
    per_query_head = bonus.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return scores.add_(per_query_head[:, :, None, :], alpha=config.value_weight)


def _linear(q: Tensor, k: Tensor, grid: BlockGrid, config: StemConfig, scale: float) -> Tensor:
    """Mean of the antidiagonal dot products of every block pair: float32 [B, Hq, Qb, Kb].

    Tokens that a partial block lacks count as zeros, as in the official code.
    """
    batch, kv_heads = k.shape[:2]
    share = config.stride / config.block_size
    size, stride = config.block_size, config.stride
    q_groups = _group_sums(q, grid.offset % size, size, stride, within=False).mul_(share)
    # Query group g meets key group stride - 1 - g.
    k_groups = _group_sums(k, 0, size, stride, within=False).mul_(share).flip(3)
    # The query heads of one KV head are rows of one matrix product: K is never repeated.
    rows = q_groups.reshape(batch, kv_heads, -1, config.stride * q.shape[3])
    scores = rows @ k_groups.flatten(3).transpose(2, 3)
    return scores.mul_(scale / config.stride).view(batch, q.shape[1], grid.q_blocks, grid.k_blocks)


def _mass(q: Tensor, k: Tensor, grid: BlockGrid, config: StemConfig, scale: float) -> Tensor:
    """Log of the largest share of attention that a key block takes from a group of a query block.

    Runs of `stride` keys and of `query_stride` queries stand for their mean; a run cut short by an end of the sequence
    for the mean of the tokens it has. What keys are apart from their mean adds to a logit what it adds to the mean of
    an exponential, to second order: half the variance of the dot product, with the dimensions taken as independent.
    Dimensions j and j + D/2 count together, for rotary embeddings turn them as a pair. With stride 8 the estimate costs
    1/171 of dense attention, 1/256 without the spread.

    Returns:
        float32 [B, Hq, Qb, Kb]; -inf for blocks of the future.
    """
    batch, heads, _, _ = q.shape
    kv_heads, size, stride = k.shape[1], config.block_size, config.stride
    q_runs, k_runs = size // config.query_stride, size // stride  # of a block
    lead = grid.offset - grid.first_block * size
    q_sizes = _group_sizes(lead, grid.q_len, size, config.query_stride).to(q.device)
    k_sizes = _group_sizes(0, grid.k_len, size, stride).to(k.device)
    queries = _group_sums(q, lead, size, config.query_stride, within=True).div_(q_sizes.clamp(min=1)[..., None])
    keys = _group_sums(k, 0, size, stride, within=True).div_(k_sizes.clamp(min=1)[..., None])
    if config.spread_weight:
        squares = _group_sums(k, 0, size, stride, within=True, square=True).div_(k_sizes.clamp(min=1)[..., None])
        spread = (squares - keys.square()).clamp_(min=0)
        keys = torch.cat([keys, _pair_sums(spread)], -1)
        weight = config.spread_weight * scale / 4  # halves: of the variance, and of a pair of squares
        queries = torch.cat([queries, _pair_sums(queries.square()).mul_(weight)], -1)
    depth = keys.shape[-1]
    queries = queries.view(batch, kv_heads, heads // kv_heads, grid.q_blocks, q_runs * depth)
    keys = keys.view(batch, kv_heads, -1, depth).transpose(2, 3)
    log_sizes = k_sizes.log().flatten()  # -inf for a group without tokens: nothing falls to it
    absent = q_sizes == 0
    causal = torch.arange(grid.k_blocks, device=q.device) <= grid.block_ids(q.device)[:, None]
    scores = torch.full((batch, heads, grid.q_blocks, grid.k_blocks), -torch.inf, device=q.device)
    step = max(1, _TILE_LOGITS // (batch * heads * q_runs * k_runs * grid.k_blocks))
    for start in range(0, grid.q_blocks, step):
        stop = min(start + step, grid.q_blocks)
        seen = grid.first_block + stop  # key blocks that any of these rows sees
        rows = queries[:, :, :, start:stop].reshape(batch, kv_heads, -1, depth)
        logits = rows @ keys[..., : seen * k_runs]
        logits.mul_(scale).add_(log_sizes[: seen * k_runs])
        taken = logits.view(batch, heads, stop - start, q_runs, seen, k_runs).logsumexp(-1)
        taken.masked_fill_(~causal[start:stop, None, :seen], -torch.inf)
        taken -= taken.logsumexp(-1, keepdim=True)
        taken.masked_fill_(absent[start:stop, :, None], -torch.inf)
        scores[:, :, start:stop, :seen] = taken.amax(3)
    return scores


def _pair_sums(x: Tensor) -> Tensor:
    """Add up dimensions j and j + D/2: [..., D] to [..., ceil(D / 2)]."""
    half = -(-x.shape[-1] // 2)
    sums: Tensor = torch.unflatten(F.pad(x, (0, 2 * half - x.shape[-1])), -1, (2, half)).sum(-2)
    return sums


def _group_sums(x: Tensor, lead: int, size: int, stride: int, *, within: bool, square: bool = False) -> Tensor:
    """Add up the tokens of each block by group; tokens that a partial block lacks count as zeros.

    Args:
        x: [B, H, T, D].
        lead: Tokens of the first block that precede x.
        size: Tokens of a block.
        stride: Tokens.
        within: Whether a group is `stride` tokens in a row, or every token of the same position modulo the stride.
        square: Whether to add up squares.

    Returns:
        float32 [B, H, blocks, groups, D]; `size / stride` groups within, or `stride` across.
    """
    batch, heads, length, dim = x.shape
    groups = size // stride if within else stride
    sums = torch.empty(batch, heads, -(-(lead + length) // size), groups, dim, device=x.device)

    def write(first: int, tokens: Tensor) -> None:
        tokens = tokens.float().square() if square else tokens
        parts = torch.unflatten(tokens, 2, (-1, size // stride, stride)).sum(4 if within else 3, dtype=torch.float32)
        sums[:, :, first : first + parts.shape[2]] = parts

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
    return sums


def _group_sizes(lead: int, length: int, size: int, stride: int) -> Tensor:
    """Count the tokens of every group of `stride` in a row: float32 [blocks, size / stride]."""
    blocks = -(-(lead + length) // size)
    present = torch.zeros(blocks * size)
    present[lead : lead + length] = 1
    return present.view(blocks, -1, stride).sum(-1)


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
