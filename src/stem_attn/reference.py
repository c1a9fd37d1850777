"""Stem in float64, token by token: the oracle that every fast path is measured against.

Written for the reader, not for speed. It materialises the full attention matrix of a head, loops over rows in Python,
and shares nothing with the fast path but the config and the block geometry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import Residual, StemConfig


def reference_stem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    scale: float,
    prompt_len: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the whole method: score, budget, select, attend.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        config: The method.
        scale: Factor of the logits.
        prompt_len: Tokens of the whole prompt; default Tk.
        softcap: As for `reference_attention`; so are sinks.
        sinks: Likewise.

    Returns:
        out float64 [B, Hq, Tq, Dv], and the kept blocks, bool [B, Hq, Qb, Kb].
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    scores = reference_scores(q, k, v, config, scale=scale, softcap=softcap, sinks=sinks)
    budget = reference_budget(config, prompt_len or grid.k_len)[grid.first_block :]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for b, row in torch.cartesian_prod(*map(torch.arange, (mask.shape[0], mask.shape[2]))).tolist():
        kept = reference_row(scores[b, :, row].tolist(), budget[row], grid.first_block + row, config, k.shape[1])
        for h, blocks in enumerate(kept):
            mask[b, h, row, blocks] = True
    properties = {"scale": scale, "residual": config.residual, "softcap": softcap, "sinks": sinks}
    out, _ = reference_attention(q, k, v, mask, config.block_size, **properties)  # type: ignore[arg-type]
    return out, mask


def reference_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score block pairs: float64 [B, Hq, Qb, Kb], -inf for future ones where the estimate is of mass."""
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    group_size = q.shape[1] // k.shape[1]
    scores = torch.empty(*q.shape[:2], grid.q_blocks, grid.k_blocks, dtype=torch.float64, device="cpu")
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            q_head, k_head, v_head = q[b, h].double(), k[b, h // group_size].double(), v[b, h // group_size].double()
            magnitude = _value_term(v_head.norm(dim=-1), config, grid)
            if config.score == "linear":
                estimate = _linear_scores(q_head, k_head, config, grid, scale, softcap)
            else:
                sink = (
                    torch.tensor(-torch.inf, dtype=torch.float64, device="cpu")
                    if sinks is None
                    else sinks[h].double().cpu()
                )
                estimate = _mass_scores(q_head, k_head, config, grid, scale, softcap, sink)
            scores[b, h] = estimate + config.value_weight * magnitude
    return scores


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits as a softcap leaves them; None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _linear_scores(
    q: Tensor, k: Tensor, config: StemConfig, grid: BlockGrid, scale: float, softcap: float | None
) -> Tensor:
    """Estimate block pairs [Qb, Kb] of a head, q [Tq, D] and k [Tk, D], from token pairs.

    The routing logit of a block pair is the sum of `scale * q_i.k_j` over the pairs with
    `i % stride + j % stride == stride - 1`, over the `block_size^2 / stride` such pairs that two whole blocks have;
    a softcap caps it.
    """
    size, stride = config.block_size, config.stride
    q_pos = torch.arange(grid.offset, grid.k_len, device="cpu")
    k_pos = torch.arange(grid.k_len, device="cpu")
    antidiagonal = (q_pos[:, None] % stride + k_pos % stride) == stride - 1
    in_row = (q_pos // size == grid.block_ids()[:, None]).double()  # [Qb, Tq]
    in_column = (k_pos // size == torch.arange(grid.k_blocks, device="cpu")[:, None]).double()  # [Kb, Tk]
    logits = q @ k.T * scale
    return capped(in_row @ (logits * antidiagonal) @ in_column.T / (size * size / stride), softcap)


def _mass_scores(
    q: Tensor, k: Tensor, config: StemConfig, grid: BlockGrid, scale: float, softcap: float | None, sink: Tensor
) -> Tensor:
    """Estimate block pairs [Qb, Kb] of a head, q [Tq, D] and k [Tk, D]: log of the largest share of any query group.

    A group is the tokens of `stride` absolute positions in a row that the call has (of `query_stride`, for queries);
    all its tokens count as its mean, and the spread of a key group's tokens adds to its logits, which are then capped.
    The sink has a share too, which is no block's.
    """
    size, stride = config.block_size, config.stride

    def paired(x: Tensor) -> Tensor:
        """Add to every dimension j of an even number D its partner, j + D/2 modulo D."""
        x = torch.nn.functional.pad(x, (0, x.shape[-1] % 2))
        return x + x.roll(x.shape[-1] // 2, -1)

    scores = torch.full((grid.q_blocks, grid.k_blocks), -torch.inf, dtype=torch.float64, device="cpu")
    key_groups = [k[start : start + stride] for start in range(0, grid.k_len, stride)]
    key_means = torch.stack([group.mean(0) for group in key_groups])
    key_spreads = torch.stack([group.var(0, correction=0) for group in key_groups])
    tokens = torch.tensor([float(len(group)) for group in key_groups], dtype=torch.float64, device="cpu")
    key_blocks = torch.arange(len(key_groups), device="cpu") * stride // size
    first_token = grid.offset
    while first_token < grid.k_len:
        end = min((first_token // config.query_stride + 1) * config.query_stride, grid.k_len)
        mean = q[first_token - grid.offset : end - grid.offset].mean(0)
        block = first_token // size
        causal = key_blocks <= block
        # Each dimension meets the mean of its own square and its partner's, so that a pair counts as one.
        variance = paired(key_spreads[causal]) @ (paired(mean**2) / 2) / 2 * scale**2
        logits = capped(key_means[causal] @ mean * scale + config.spread_weight * variance / 2, softcap)
        mass = tokens[causal] * torch.exp(logits)
        share = torch.zeros(grid.k_blocks, dtype=torch.float64, device="cpu").index_add(
            0, key_blocks[causal], mass / (mass.sum() + sink.exp())
        )
        row = scores[block - grid.first_block]
        row[: block + 1] = row[: block + 1].maximum(share[: block + 1].log())
        first_token = end
    return scores


def _value_term(norms: Tensor, config: StemConfig, grid: BlockGrid) -> Tensor:
    """What each key block's value norms [Tk] add to its score: [Kb]."""
    size, stride = config.block_size, config.stride
    term = torch.zeros(grid.k_blocks, dtype=torch.float64, device="cpu")
    if config.value_term == "log":
        for j in range(grid.k_blocks):
            term[j] = max(0.0, math.log(max(norms[j * size : (j + 1) * size].max().item(), 1e-300)))
    elif config.value_term == "zscore":
        whole = grid.k_len // stride  # groups; a rest of fewer than `stride` tokens has no z-score
        if whole >= 2:
            groups = norms[: whole * stride].view(whole, stride).amax(1)
            logs = (groups + 1e-6).log()
            z = (logs - logs.mean()) / (logs.std() + 1e-6)
            for g in range(whole):
                term[g * stride // size] += max(0.0, z[g].item()) / (size // stride)
    return term


def reference_budget(config: StemConfig, prompt_len: int) -> list[int]:
    """Blocks that each row of the whole prompt may keep, not yet clipped to its causal blocks."""
    n = math.ceil(prompt_len / config.block_size)
    if n < config.dense_below:
        return [n] * n
    most = 1e300  # so that nothing overflows
    start = min(config.budget_scale * (config.ratio(n) * n + min(config.budget_bias, most)), most)
    if config.decay_from == "first_row":
        rows = [math.floor(start - start * (1 - config.decay) / n * i) for i in range(n)]
    else:
        plateau = min(max(int(start), config.budget_floor), n)
        falling = torch.linspace(plateau, config.decay * plateau, n - plateau, dtype=torch.float64, device="cpu")
        rows = [plateau] * plateau + [math.floor(x) for x in falling.tolist()]
    rows = [min(max(kept, config.budget_floor), n) for kept in rows]
    for i in range(max(n - config.tail_blocks, 0), n):
        rows[i] = max(rows[i], math.ceil(config.tail_ratio * (i + 1)))
    return rows


def reference_row(
    scores: list[list[float]], budget: int, block: int, config: StemConfig, kv_heads: int
) -> list[list[int]]:
    """Return the key blocks that the query block numbered `block` keeps, in ascending order, for every head.

    Args:
        scores: A list a head; the scores of all key blocks.
        budget: Blocks.
        block: Absolute number of the query block.
        config: The method.
        kv_heads: KV heads.
    """
    alone = [_row_of_a_head(row, budget, block, config) for row in scores]
    if config.budget_scope == "head":
        return alone
    causal = range(block + 1)
    if config.score == "linear":
        sums = [torch.tensor(row[: block + 1], dtype=torch.float64, device="cpu").logsumexp(0).item() for row in scores]
        scores = [[x - total for x in row] for row, total in zip(scores, sums, strict=True)]
    forced = {j for j in causal if j < config.sink_blocks or j > block - config.local_blocks}
    own_budget = min(budget, block + 1)
    if config.forced_blocks == "inside":
        own_budget = max(own_budget, len(forced))
    least = max(len(forced), math.floor(own_budget * config.head_floor))
    kept = []
    for row in scores:
        best_first = sorted((j for j in causal if j not in forced), key=lambda j, row=row: (-row[j], j))  # type: ignore[misc]
        kept.append(forced.union(best_first[: least - len(forced)]))
    per_scope = len(scores) // (kv_heads if config.budget_scope == "group" else 1)
    for first in range(0, len(scores), per_scope):
        heads = range(first, first + per_scope)
        rivals = sorted((-scores[h][j], h, j) for h in heads for j in causal if j not in kept[h])
        room = sum(len(alone[h]) - len(kept[h]) for h in heads)
        for _, h, j in rivals[:room]:
            kept[h].add(j)
    return [sorted(blocks) for blocks in kept]


def _row_of_a_head(scores: list[float], budget: int, block: int, config: StemConfig) -> list[int]:
    """Return what a head keeps of its own budget."""
    causal = range(block + 1)
    forced = {j for j in causal if j < config.sink_blocks or j > block - config.local_blocks}
    best_first = sorted(causal, key=lambda j: (-scores[j], j))
    if config.forced_blocks == "on_top":
        return sorted(forced.union(best_first[:budget]))
    chosen = [j for j in best_first if j not in forced]
    return sorted(forced.union(chosen[: max(0, budget - len(forced))]))


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    block_size: int,
    *,
    scale: float,
    window: int | None = None,
    residual: Residual = "none",
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        residual: `"mean"`: a pruned block before a query's own joins as one more key and value, the means of its
            tokens rounded to the inputs' dtype, with the weight of that many.
        softcap: A scaled logit x becomes `softcap * tanh(x / softcap)`, that of a mean too; or None.
        sinks: [Hq], one more logit a head, whose value is zero; or None.

    Returns:
        out float64 [B, Hq, Tq, Dv] and the natural log-sum-exp float64 [B, Hq, Tq].
    """
    grid = BlockGrid(q.shape[2], k.shape[2], block_size)
    q_pos = torch.arange(grid.offset, grid.k_len, device="cpu")[:, None]
    k_pos = torch.arange(grid.k_len, device="cpu")
    visible = (k_pos <= q_pos) & (k_pos > q_pos - (window or grid.k_len))
    in_block = (torch.arange(grid.k_blocks, device="cpu")[:, None] == k_pos // block_size).double()  # [Kb, Tk]
    tokens = in_block.sum(1, keepdim=True)
    past = torch.arange(grid.k_blocks, device="cpu") < q_pos // block_size
    group_size = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64, device="cpu")
    lse = torch.empty(q.shape[:3], dtype=torch.float64, device="cpu")
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kept = mask[b, h].cpu()[q_pos[:, 0] // block_size - grid.first_block]  # [Tq, Kb]
            query, key, value = (x.double().cpu() for x in (q[b, h], k[b, h // group_size], v[b, h // group_size]))
            logits = capped(query @ key.T * scale, softcap)
            logits = logits.masked_fill(~(visible & kept[:, k_pos // block_size]), -torch.inf)
            if residual == "mean":
                k_means, v_means = ((in_block @ x / tokens).to(q.dtype).double() for x in (key, value))
                means = capped(query @ k_means.T * scale, softcap) + tokens.log().T
                logits = torch.cat([logits, means.masked_fill(kept | ~past, -torch.inf)], 1)
                value = torch.cat([value, v_means])
            if sinks is not None:
                logits = torch.cat([logits, sinks[h].double().cpu().expand(len(logits), 1)], 1)
                value = torch.cat([value, torch.zeros_like(value[:1])])
            lse[b, h] = logits.logsumexp(-1)
            out[b, h] = logits.softmax(-1) @ value
    return out, lse
