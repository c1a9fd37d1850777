"""Block-sparse attention in plain torch: made for CPUs, runs on any device.

A task is one query block of one head. Tasks are sorted by how many key blocks they keep, so that a batch of tasks
of about equal counts is two batched matmuls over gathered keys and values. It makes no difference whether heads and
batch rows keep equally many blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.backends.base import Backend, empty_output
from stem_attn.blocks import BlockSelection

# Logits of one batch of tasks: more costs cache misses, fewer costs calls.
_BATCH_LOGITS = 2**20


class CpuBackend(Backend):
    """Gather the kept blocks of a batch of query blocks and attend with batched matmuls.

    Half precisions are computed in float32: without native instructions a bfloat16 matmul is many times slower,
    and float32 logits lose nothing.
    """

    name = "cpu"

    def why_unsupported(self, q: Tensor, k: Tensor, v: Tensor, *, block_size: int, window: int | None) -> str | None:
        return None

    def suits(self, q: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> bool:
        return True

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        *,
        scale: float,
        window: int | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        grid, size = selection.grid, selection.block_size
        heads, q_len, kv_heads = q.shape[1], q.shape[2], k.shape[1]
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32

        # Whole query blocks: a partial first block is padded in front, a partial last one behind.
        before = grid.offset - grid.first_block * size
        after = grid.q_blocks * size - before - q_len
        partial = before + after > 0
        padded = F.pad(q, (0, 0, before, after)) if partial else q
        q_blocks = torch.unflatten(padded, 2, (grid.q_blocks, size))  # [B, Hq, Qb, size, D]
        out = empty_output(padded, v)
        out_blocks = torch.unflatten(out, 2, (grid.q_blocks, size))
        lse_blocks = q.new_empty(q_blocks.shape[:4], dtype=torch.float32) if return_lse else None
        k_blocks = _to_blocks(k, grid.k_blocks, size, compute)
        v_blocks = _to_blocks(v, grid.k_blocks, size, compute)

        counts = selection.counts.flatten()
        order = counts.argsort(descending=True, stable=True)
        counts = counts[order]
        batches = _batches(counts.tolist(), size)
        gathered = max(width * (stop - start) for start, stop, width in batches)  # blocks
        logits_buffer = k_blocks.new_empty(gathered * size * size)
        k_buffer = k_blocks.new_empty(gathered, size * k.shape[3])
        v_buffer = k_blocks.new_empty(gathered, size * v.shape[3])

        future = k_blocks.new_full((size, size), -math.inf).triu_(1)
        for start, stop, width in batches:
            tasks, task, n = stop - start, order[start:stop], width * size
            row = task % grid.q_blocks
            head = task // grid.q_blocks % heads
            sample = task // (grid.q_blocks * heads)

            # Slots are packed to the right, so that the diagonal block is the last one of every task.
            slot = torch.arange(width, device=q.device) - (width - counts[start:stop, None])  # [tasks, width]
            kept = selection.indices[sample, head, row, :width].long().gather(1, slot.clamp(min=0))
            block = kept + ((sample * kv_heads + head // (heads // kv_heads)) * grid.k_blocks)[:, None]
            keys = k_buffer[: tasks * width]
            values = v_buffer[: tasks * width]
            torch.index_select(k_blocks, 0, block.flatten(), out=keys)
            torch.index_select(v_blocks, 0, block.flatten(), out=values)

            # Base 2: exp2 is the cheaper exponential.
            logits = logits_buffer[: tasks * size * n].view(tasks, size, n)
            queries = q_blocks[sample, head, row].to(compute)
            logits.baddbmm_(queries, keys.view(tasks, n, -1).mT, beta=0, alpha=scale * math.log2(math.e))
            logits[:, :, -size:] += future
            ages = (row + grid.first_block)[:, None] - kept  # in blocks
            _hide(logits, ages, slot < 0, size, window)

            peak = logits.amax(-1, keepdim=True)
            total = logits.sub_(peak).exp2_().sum(-1, keepdim=True)
            result = torch.bmm(logits, values.view(tasks, n, -1)).div_(total)
            out_blocks[sample, head, row] = result.to(q.dtype)
            if lse_blocks is not None:
                lse_blocks[sample, head, row] = ((peak + total.log2()) * math.log(2)).squeeze(-1).float()

        if partial:
            out = empty_output(q, v).copy_(out[:, :, before : before + q_len])
        lse = None if lse_blocks is None else lse_blocks.flatten(2)[:, :, before : before + q_len].contiguous()
        return out, lse


def _hide(logits: Tensor, ages: Tensor, padding: Tensor, size: int, window: int | None) -> None:
    """Set the logits of padding slots, and of keys that have left the window, to -inf.

    Args:
        logits: [tasks, size, width * size], changed in place.
        ages: int64 [tasks, width]; how many blocks a slot's key block lies before its query block.
        padding: bool [tasks, width]; slots that hold no block. They come first, then the oldest blocks.
        size: Tokens a block.
        window: Tokens of the sliding window, or None.
    """
    outside = padding
    if window is not None:
        outside = padding | ((ages + 1) * size > window)  # the block's first key and the last query
    width = int(outside.sum(-1).max())
    if width == 0:
        return
    hidden = padding[:, None, :width, None]
    if window is not None:
        token = torch.arange(size, device=logits.device)
        distance = (ages[:, :width] * size)[:, None, :, None] + (token[:, None, None] - token)
        hidden = hidden | (distance >= window)
    torch.unflatten(logits, 2, (-1, size))[:, :, :width].masked_fill_(hidden, -math.inf)


def _to_blocks(x: Tensor, blocks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Lay out keys or values as [B * Hkv * Kb, size * D], a partial last block padded with zeros."""
    batch, heads, length, dim = x.shape
    if x.dtype != dtype or not x.is_contiguous() or length != blocks * size:
        whole = x.new_zeros((batch, heads, blocks * size, dim), dtype=dtype)
        whole[:, :, :length] = x
        x = whole
    return x.view(-1, size * dim)


def _batches(counts: list[int], size: int) -> list[tuple[int, int, int]]:
    """Cut tasks, sorted by falling counts, into batches (start, stop, largest count) of nearly equal counts."""
    batches = []
    start = 0
    while start < len(counts):
        width = counts[start]
        limit = min(len(counts), start + max(1, _BATCH_LOGITS // (width * size * size)))
        stop = start + 1
        while stop < limit and counts[stop] >= width - max(1, width // 16):
            stop += 1
        batches.append((start, stop, width))
        start = stop
    return batches
