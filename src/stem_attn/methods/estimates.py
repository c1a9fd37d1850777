"""Estimates of attention, in tiles: nothing here is of size tokens x tokens.

A problem is one KV head of one batch row, with its G query heads; K is never repeated. Queries are padded to whole
blocks: an absent query is one that a partial first or last block lacks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid

_TILE_NUMBERS = 2**24  # of float32 in the largest tensor of a tile, 64 MiB


def tiles(problems: int, rows: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Cut problems and their rows into tiles that fit in memory.

    Args:
        problems: How many there are.
        rows: Rows of a problem.
        numbers: What one row of one problem takes.

    Yields:
        Slices of problems and of rows.
    """
    room = max(_TILE_NUMBERS // numbers, 1)
    row_step = min(rows, room)
    step = room // row_step
    for first in range(0, problems, step):
        for row in range(0, rows, row_step):
            yield slice(first, min(first + step, problems)), slice(row, min(row + row_step, rows))


def by_problem(q: Tensor, kv_heads: int, grid: BlockGrid) -> Tensor:
    """Lay out queries as [B * Hkv, G, Qb, block_size, D], absent ones as zeros."""
    lead = grid.offset % grid.block_size
    tail = grid.q_blocks * grid.block_size - lead - grid.q_len
    padded = F.pad(q, (0, 0, lead, tail)) if lead or tail else q
    return padded.reshape(q.shape[0] * kv_heads, -1, grid.q_blocks, grid.block_size, q.shape[3])


def key_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """Lay out keys or values as [B * Hkv, Kb, block_size, D], a partial last block padded with zeros."""
    tail = grid.k_blocks * grid.block_size - grid.k_len
    padded = F.pad(x, (0, 0, 0, tail)) if tail else x
    return padded.reshape(-1, grid.k_blocks, grid.block_size, x.shape[3])


def present_queries(grid: BlockGrid, device: torch.device) -> Tensor:
    """Tell which queries are there: bool [Qb, block_size]."""
    places = torch.arange(grid.q_blocks * grid.block_size, device=device) - grid.offset % grid.block_size
    return ((places >= 0) & (places < grid.q_len)).view(grid.q_blocks, grid.block_size)


def query_means(q: Tensor, grid: BlockGrid) -> Tensor:
    """Average the queries of every block: float32 [B, Hq, Qb, D]."""
    sums = by_problem(q, q.shape[1], grid).sum(3, dtype=torch.float32)
    return (sums / present_queries(grid, q.device).sum(1)[:, None]).view(*q.shape[:2], grid.q_blocks, -1)


def key_means(k: Tensor, grid: BlockGrid) -> Tensor:
    """Average the keys of every block: float32 [B, Hkv, Kb, D]."""
    counts = torch.full((grid.k_blocks,), grid.block_size, dtype=torch.int64, device=k.device)
    counts[-1] = grid.k_len - (grid.k_blocks - 1) * grid.block_size
    return (key_blocks(k, grid).sum(2, dtype=torch.float32) / counts[:, None]).view(*k.shape[:2], grid.k_blocks, -1)


def pooled_logits(q: Tensor, k: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    """Multiply the mean query with the mean key of every block pair: float32 [B, Hq, Qb, Kb], -inf in the future."""
    means = query_means(q, grid)
    rows = means.view(k.shape[0], k.shape[1], -1, q.shape[3])
    logits = (rows @ key_means(k, grid).mT).mul_(scale).view(*means.shape[:3], grid.k_blocks)
    future = torch.arange(grid.k_blocks, device=q.device) > grid.block_ids(q.device)[:, None]
    return logits.masked_fill_(future, -torch.inf)


def attention_tiles(
    q: Tensor, k: Tensor, grid: BlockGrid, scale: float, *, stride: int = 1, width: int = 0
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Compute softmax attention tile by tile, of tokens or of strided groups of tokens.

    With a stride, `stride` neighbours are one group, and the logit of two groups is the mean over the pairs of an
    antidiagonal: the first query of one with the last key of the other, and so on. A key group in the future is masked,
    one that overlaps the query's is not.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D].
        grid: The rows and columns.
        scale: Factor of the logits.
        stride: Tokens a group; it divides the block size. 1: attention as it is.
        width: Numbers that the caller computes of every query group and key block.

    Yields:
        (problems, rows, probabilities): float32 [problems, G, rows, groups, blocks, groups], over the key blocks from
        0 to the last one that the tile's rows see, 0 for absent queries.
    """
    groups = grid.block_size // stride
    queries = torch.unflatten(by_problem(q, k.shape[1], grid), 3, (groups, stride)).flip(4).flatten(4)
    keys = torch.unflatten(key_blocks(k, grid), 2, (groups, stride)).flatten(3)  # [N, Kb, groups, stride * D]
    present = present_queries(grid, q.device).view(-1, groups, stride).any(-1)  # [Qb, g]
    dtype = torch.promote_types(q.dtype, torch.float32)
    places = torch.arange(grid.k_blocks * groups, device=q.device)
    problems, heads = queries.shape[:2]
    for which, rows in tiles(problems, grid.q_blocks, heads * groups * grid.k_blocks * max(groups, width)):
        blocks = grid.first_block + rows.stop
        tile_queries = queries[which, :, rows].to(dtype).flatten(1, 3)
        tile_keys = keys[which, :blocks].to(dtype).flatten(1, 2)
        logits = torch.unflatten((tile_queries @ tile_keys.mT).mul_(scale / stride), 1, (heads, -1))
        own = places[(grid.first_block + rows.start) * groups : blocks * groups]
        logits.masked_fill_(places[: blocks * groups] > own[:, None], -torch.inf)
        probabilities = torch.softmax(logits, -1).mul_(present[rows].flatten()[:, None])
        yield which, rows, torch.unflatten(torch.unflatten(probabilities, 3, (blocks, groups)), 2, (-1, groups))


def attention_mass(q: Tensor, k: Tensor, grid: BlockGrid, scale: float, *, stride: int = 1) -> Tensor:
    """Return the attention that every key block gets from every query block: float32 [B, Hq, Qb, Kb].

    A row sums to 1: it is the mean over its queries, or strided groups of them (see `attention_tiles`).
    """
    heads = q.shape[1] // k.shape[1]
    shape = q.shape[0] * k.shape[1], heads, grid.q_blocks, grid.k_blocks
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for which, rows, probabilities in attention_tiles(q, k, grid, scale, stride=stride):
        mass[which, :, rows, : probabilities.shape[4]] = probabilities.sum((3, 5))
    return (mass / mass.sum(-1, keepdim=True)).view(*q.shape[:2], grid.q_blocks, grid.k_blocks)


def last_attention(q: Tensor, k: Tensor, last: int, scale: float) -> tuple[Tensor, Tensor]:
    """Average the attention of the last queries by key and by distance.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D].
        last: How many queries to look at; all where there are fewer.
        scale: Factor of the logits.

    Returns:
        Vertical and slash, float32 [B, Hq, Tk] each: the mean probability of key j, and of the key at distance j.
    """
    last = min(last, q.shape[2])
    batch, kv_heads, k_len, dim = k.shape
    queries = q[:, :, -last:].reshape(batch * kv_heads, -1, last, dim)
    keys = k.reshape(-1, k_len, dim)
    heads = queries.shape[1]
    distance = torch.arange(k_len - last, k_len, device=q.device)[:, None] - torch.arange(k_len, device=q.device)
    vertical = torch.empty(len(queries), heads, k_len, dtype=torch.float32, device=q.device)
    slash = torch.empty_like(vertical)
    for which, _ in tiles(len(queries), 1, heads * last * k_len):
        logits = (
            (queries[which].float().flatten(1, 2) @ keys[which].float().mT).mul_(scale).view(-1, heads, last, k_len)
        )
        probabilities = torch.softmax(logits.masked_fill_(distance < 0, -torch.inf), -1)
        vertical[which] = probabilities.mean(2)
        # Key p - j is at distance j of query p; distances beyond the first key have none.
        by_distance = probabilities.gather(3, distance.clamp(min=0).expand_as(probabilities))
        slash[which] = by_distance.masked_fill_(distance < 0, 0).mean(2)
    return vertical.view(batch, -1, k_len), slash.view(batch, -1, k_len)
