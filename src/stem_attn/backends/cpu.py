"""Block-sparse attention in plain torch: made for CPUs, runs on any device.

A task is one query block of one head. Tasks are sorted by how many key blocks they keep, and a batch of tasks of
equal counts is attended to at once, over gathered keys and values. So it makes no difference whether heads and batch
rows keep equally many blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.backends.base import BlockedBackend, Geometry
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.config import StemConfig

# Logits of a batch of tasks per thread: more of them leave the cache, fewer make more calls.
_THREAD_LOGITS = 2**19


class CpuBackend(BlockedBackend):
    """Gather the kept blocks of a batch of query blocks, and attend with batched matmuls.

    Half precisions are computed in float32: a bfloat16 matmul is many times slower on a CPU without instructions for
    it, and would round the logits. Where there are such instructions, bfloat16 goes through SDPA, which uses them.
    """

    name = "cpu"
    automatic_on = ("*",)

    def break_even(self, geometry: Geometry, config: StemConfig) -> float:
        # Zen 4, float32, 8192 tokens, head dim 64 (docs/log.md): attention is 2.2 times as fast as SDPA at density .26,
        # so d costs 1.75 d, and the selection a tenth of it.
        return 0.5

    def attend_part(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        attend_blocks(q, k, v, selection, scale=call.scale, window=call.window, out=out, lse=lse)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float,
    window: int | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attend over the kept blocks.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        selection: The kept blocks.
        scale: Factor of the logits.
        window: Tokens of a causal sliding window to apply inside the kept blocks, or None.
        out: [B, Hq, Tq, Dv] in q's dtype; written.
        lse: float32 [B, Hq, Tq], the natural log-sum-exp of the logits; written. None: not wanted.
    """
    grid, size = selection.grid, selection.block_size
    heads, q_len, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    fused = q.dtype == torch.bfloat16 and lse is None and _has_native_bfloat16(q.device)
    compute = q.dtype if fused or q.dtype == torch.float64 else torch.float32

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
    task_lse = None if lse is None else queries.new_empty(len(order), size)

    batches = _batches(counts.tolist(), size)
    room = max((stop - start) * width for start, stop, width in batches)  # blocks
    key_buffer = keys.new_empty(room, keys.shape[1])
    value_buffer = values.new_empty(room, values.shape[1])
    logit_buffer = keys.new_empty(room * size * size)
    future = keys.new_full((size, size), -math.inf).triu_(1)
    for start, stop, width in batches:
        tasks = slice(start, stop)
        kept = blocks[tasks, :width]
        chosen, used = kept.flatten(), kept.numel()
        torch.index_select(keys, 0, chosen, out=key_buffer[:used])
        torch.index_select(values, 0, chosen, out=value_buffer[:used])
        batch_keys = key_buffer[:used].view(stop - start, width * size, -1)
        batch_values = value_buffer[:used].view(stop - start, width * size, -1)
        rows = 1 if fused and window is None else stop - start  # without logits, tasks have one mask in common
        logits = logit_buffer[: rows * width * size * size].view(rows, size, width * size)
        if fused:
            logits.zero_()  # only the mask: SDPA adds its own logits
        else:
            logits.baddbmm_(queries[tasks], batch_keys.mT, beta=0, alpha=scale)
        logits[:, :, -size:] += future  # the last block that a task keeps is its diagonal one
        if window is not None:
            _hide_left_of_window(logits, diagonal[tasks, None] - kept, window)
        if task_lse is not None:
            torch.logsumexp(logits, -1, out=task_lse[tasks])
        if fused:
            result[tasks] = F.scaled_dot_product_attention(
                queries[None, tasks], batch_keys[None], batch_values[None], attn_mask=logits[None], scale=scale
            )[0]
        else:
            torch.bmm(torch.softmax(logits, -1, out=logits), batch_values, out=result[tasks])

    by_row = q.new_empty(*padded.shape[:2], grid.q_blocks, size, v.shape[3])
    by_row[sample, head, row] = result.to(q.dtype)
    out.copy_(by_row.flatten(2, 3)[:, :, before : before + q_len])
    if lse is not None and task_lse is not None:
        lse_by_row = q.new_empty(*padded.shape[:2], grid.q_blocks, size, dtype=torch.float32)
        lse_by_row[sample, head, row] = task_lse.float()
        lse.copy_(lse_by_row.flatten(2)[:, :, before : before + q_len])


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _batches(counts: list[int], size: int) -> list[tuple[int, int, int]]:
    """Cut tasks, sorted by falling counts, into batches (start, stop, count) of equal counts."""
    batches = []
    start = 0
    while start < len(counts):
        width = counts[start]
        limit = max(1, _THREAD_LOGITS // (width * size * size)) * torch.get_num_threads()
        stop = start + 1
        while stop < min(start + limit, len(counts)) and counts[stop] == width:
            stop += 1
        batches.append((start, stop, width))
        start = stop
    return batches


def _hide_left_of_window(logits: Tensor, ages: Tensor, window: int) -> None:
    """Set the logits of keys that have left the window to -inf.

    Args:
        logits: [tasks, size, width * size], changed in place.
        ages: int [tasks, width], falling; blocks from a kept block to the task's query block.
        window: Tokens of the sliding window.
    """
    size = logits.shape[1]
    # The oldest blocks come first; the last query of a block does not see the first key of those beyond the edge.
    slots = int(((ages + 1) * size > window).sum(-1).max())
    token = torch.arange(size, device=logits.device)
    distance = ages[:, None, :slots, None] * size + token[:, None, None] - token
    by_slot = torch.unflatten(logits, 2, (-1, size))
    by_slot[:, :, :slots].masked_fill_(distance >= window, -math.inf)


def _to_blocks(x: Tensor, blocks: int, size: int, dtype: torch.dtype) -> Tensor:
    """Lay out keys or values as [B * Hkv * Kb, size * D], a partial last block padded with zeros."""
    batch, heads, length, dim = x.shape
    if x.dtype != dtype or not x.is_contiguous() or length != blocks * size:
        whole = x.new_zeros((batch, heads, blocks * size, dim), dtype=dtype)
        whole[:, :, :length] = x
        x = whole
    return x.view(-1, size * dim)
