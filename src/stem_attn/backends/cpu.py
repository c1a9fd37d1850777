"""Block-sparse attention in plain torch: made for CPUs, runs on any device.

A task is one query block of one head. Tasks are sorted by how many key blocks they keep, and a batch of tasks of
nearly equal counts is two batched matmuls over gathered keys and values. So it makes no difference whether heads and
batch rows keep equally many blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.backends.base import Backend, empty_output
from stem_attn.blocks import BlockSelection

# Logits of a batch of tasks per thread: more of them leave the cache, fewer make more calls.
_THREAD_LOGITS = 2**19


class CpuBackend(Backend):
    """Gather the kept blocks of a batch of query blocks, and attend with batched matmuls.

    Half precisions are computed in float32: a bfloat16 matmul is many times slower on a CPU without instructions for
    it, and would round the logits.
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

        # N tasks: below, [N, ...] is in their order.
        counts, order = selection.counts.flatten().sort(descending=True, stable=True)
        row = order % grid.q_blocks
        head = order // grid.q_blocks % heads
        sample = order // (grid.q_blocks * heads)
        first = (sample * kv_heads + head // (heads // kv_heads)) * grid.k_blocks  # block 0 of the task's KV head
        diagonal = first + row + grid.first_block
        blocks = selection.indices.flatten(0, 2)[order].add_(first.int()[:, None])  # [N, S]

        # Whole query blocks: a partial first block is padded in front, a partial last one behind.
        before = grid.offset - grid.first_block * size
        after = grid.q_blocks * size - before - q_len
        padded = F.pad(q, (0, 0, before, after)) if before + after else q
        queries = torch.unflatten(padded, 2, (grid.q_blocks, size))[sample, head, row].to(compute)  # [N, size, D]
        keys = _to_blocks(k, grid.k_blocks, size, compute)
        values = _to_blocks(v, grid.k_blocks, size, compute)
        result = queries.new_empty(len(order), size, v.shape[3])
        peak = queries.new_empty(len(order), size, 1)
        total = queries.new_empty(len(order), size, 1)

        batches = _batches(counts.tolist(), size)
        room = max((stop - start) * width for start, stop, width in batches)  # blocks
        key_buffer = keys.new_empty(room, keys.shape[1])
        value_buffer = values.new_empty(room, values.shape[1])
        logit_buffer = keys.new_empty(room * size * size)
        future = keys.new_full((size, size), -math.inf).triu_(1)
        for start, stop, width in batches:
            tasks = slice(start, stop)
            kept, padding = _pack_right(blocks[tasks, :width], counts[tasks])
            chosen, used = kept.flatten(), kept.numel()
            torch.index_select(keys, 0, chosen, out=key_buffer[:used])
            torch.index_select(values, 0, chosen, out=value_buffer[:used])
            batch_keys = key_buffer[:used].view(stop - start, width * size, -1)
            batch_values = value_buffer[:used].view(stop - start, width * size, -1)
            logits = logit_buffer[: used * size * size].view(stop - start, size, width * size)

            # In base 2: exp2 is the cheaper exponential.
            logits.baddbmm_(queries[tasks], batch_keys.mT, beta=0, alpha=scale * math.log2(math.e))
            logits[:, :, -size:] += future  # the last slot holds the diagonal block
            by_slot = torch.unflatten(logits, 2, (width, size))
            if padding is not None:
                slots = int(padding.sum(-1).max())
                by_slot[:, :, :slots].masked_fill_(padding[:, None, :slots, None], -math.inf)
            if window is not None:
                _hide_left_of_window(by_slot, diagonal[tasks, None] - kept, padding, window)
            torch.amax(logits, -1, keepdim=True, out=peak[tasks])
            torch.sum(logits.sub_(peak[tasks]).exp2_(), -1, keepdim=True, out=total[tasks])
            torch.bmm(logits, batch_values, out=result[tasks])

        out = empty_output(padded, v)
        torch.unflatten(out, 2, (grid.q_blocks, size))[sample, head, row] = result.div_(total).to(q.dtype)
        if before + after:
            out = empty_output(q, v).copy_(out[:, :, before : before + q_len])
        if not return_lse:
            return out, None
        lse = q.new_empty(*padded.shape[:2], grid.q_blocks, size, dtype=torch.float32)
        lse[sample, head, row] = (total.log2_().add_(peak) * math.log(2)).squeeze(-1).float()
        return out, lse.flatten(2)[:, :, before : before + q_len].contiguous()


def _batches(counts: list[int], size: int) -> list[tuple[int, int, int]]:
    """Cut tasks, sorted by falling counts, into batches (start, stop, largest count) of nearly equal counts."""
    batches = []
    start = 0
    while start < len(counts):
        width = counts[start]
        limit = max(1, _THREAD_LOGITS // (width * size * size)) * torch.get_num_threads()
        stop = start + 1
        while stop < min(start + limit, len(counts)) and counts[stop] >= width - max(1, width // 16):
            stop += 1
        batches.append((start, stop, width))
        start = stop
    return batches


def _pack_right(blocks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Shift every task's blocks to the right, so that the diagonal block comes last.

    Args:
        blocks: int32 [tasks, width], left-packed in ascending order.
        counts: int32 [tasks], falling.

    Returns:
        The blocks, and bool [tasks, width], true in the slots on the left that stay empty, or None if none does.
        An empty slot repeats the task's first block.
    """
    width = blocks.shape[1]
    if int(counts[-1]) == width:
        return blocks, None
    slot = torch.arange(width, device=blocks.device) - (width - counts[:, None])
    return blocks.gather(1, slot.clamp(min=0)), slot < 0


def _hide_left_of_window(logits: Tensor, ages: Tensor, padding: Tensor | None, window: int) -> None:
    """Set the logits of keys that have left the window to -inf.

    Args:
        logits: [tasks, size, width, size], changed in place.
        ages: int [tasks, width]; blocks from a slot's key block to the task's query block.
        padding: bool [tasks, width]; empty slots, or None.
        window: Tokens of the sliding window.
    """
    size = logits.shape[1]
    edge = (ages + 1) * size > window  # the last query does not see the block's first key
    # The oldest blocks come first, behind empty slots.
    slots = int((edge if padding is None else edge | padding).sum(-1).max())
    token = torch.arange(size, device=logits.device)
    distance = ages[:, None, :slots, None] * size + token[:, None, None] - token
    logits[:, :, :slots].masked_fill_(distance >= window, -math.inf)


def _to_blocks(x: Tensor, blocks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Lay out keys or values as [B * Hkv * Kb, size * D], a partial last block padded with zeros."""
    batch, heads, length, dim = x.shape
    if x.dtype != dtype or not x.is_contiguous() or length != blocks * size:
        whole = x.new_zeros((batch, heads, blocks * size, dim), dtype=dtype)
        whole[:, :, :length] = x
        x = whole
    return x.view(-1, size * dim)
