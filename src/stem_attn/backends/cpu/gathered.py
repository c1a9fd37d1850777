"""Attention over kept blocks in plain torch: made for CPUs, runs on any device.

A task is one query block of one head. A job is a batch of tasks of one batch row that keep equally many key blocks:
their keys and values are gathered and attended to with batched matmuls. Threads take the jobs one by one, the largest
first, so it makes no difference whether heads and batch rows keep equally many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.workers import cores_each, on_worker, run_jobs

# Logits of a job, if it holds more than one task: more of them leave the cache, fewer make more calls. Only one thread
# at a time may call, so jobs grow with the threads beyond eight.
_JOB_LOGITS = 2**19
_LOG2_E = math.log2(math.e)


class _Job(NamedTuple):
    """Tasks of one batch row with equally many kept blocks, and with the same place of the queries in their block."""

    sample: int
    tasks: slice  # of the plan's tensors
    width: int  # blocks that each task keeps
    span: tuple[int, int]  # query tokens of the rows that the tasks' rows are counted in
    place: int  # of the first query of a row in its block
    first_block: int  # of the plan's


class _Jobs(NamedTuple):
    """The jobs, the largest first, and their tasks: those of a job follow one another."""

    jobs: list[_Job]
    heads: list[int]  # of every task
    rows: list[int]  # counted from the first row of the job's span
    blocks: Tensor  # int32 [kept]; the tasks' kept blocks, counted through all KV heads
    diagonals: Tensor  # int32 [tasks]; the tasks' own blocks, likewise


def attend_blocks(
    call: Call, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, out: Tensor, lse: Tensor | None
) -> None:
    """Attend over the kept blocks.

    Half precisions are computed in float32. Where the CPU multiplies bfloat16 natively, the softmax's weights are
    rounded to bfloat16 for their product with the values, as SDPA does.

    Args:
        call: What attention is asked for; its tensors are not read.
        q: [B, Hq, Tq, D], the last Tq of Tk tokens; any strides.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, Dv].
        selection: The kept blocks.
        out: [B, Hq, Tq, Dv] in q's dtype, any strides; written.
        lse: float32 [B, Hq, Tq], the natural log-sum-exp of the logits; written. None: not wanted.
    """
    on_worker(lambda: _attend(call, q, k, v, selection, out, lse), q.device)


def _attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, out: Tensor, lse: Tensor | None
) -> None:
    scale, softcap, sinks, window = call.scale, call.softcap, call.sinks, call.window
    size = selection.block_size
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weigh = torch.bfloat16 if multiplies_bfloat16(q.dtype, q.device) else wide
    device = q.device
    keys, values = _to_blocks(k, size), _to_blocks(v, size)
    plan = _make_jobs(selection, k.shape[1])
    shapes = [(job.tasks.stop - job.tasks.start, _rows(job, size), job.width) for job in plan.jobs]
    most_rows = max(n * rows for n, rows, _ in shapes)
    most_blocks = max(n * width for n, _, width in shapes)
    most_logits = max(n * rows * width for n, rows, width in shapes) * size
    future = torch.full((size, size), -math.inf, dtype=wide, device=device).triu_(1)
    sink_logits = None if sinks is None else (sinks.to(wide) * _LOG2_E)[plan.heads, None, None]  # of every task

    def start() -> Callable[[int], None]:
        query_room = torch.empty(most_rows, q.shape[3], dtype=wide, device=device)
        gather_keys, gather_values = _gatherer(keys, most_blocks, wide), _gatherer(values, most_blocks, weigh)
        logit_room = torch.empty(most_logits, dtype=wide, device=device)
        weight_room = logit_room if weigh == wide else torch.empty(most_logits, dtype=weigh, device=device)
        result_room = torch.empty(most_rows, v.shape[3], dtype=weigh, device=device)

        @cache
        def views(n: int, rows: int, width: int) -> tuple[Tensor, ...]:
            shape = (n, rows, width * size)
            logits, weights = (room[: math.prod(shape)].view(shape) for room in (logit_room, weight_room))
            return (
                logits,
                logits[:, :, -size:],  # the last block that a task keeps is its diagonal one
                weights,
                query_room[: n * rows].view(n, rows, -1),
                result_room[: n * rows].view(n, rows, -1),
            )

        @cache
        def by_row(sample: int, span: tuple[int, int], rows: int) -> list[Tensor]:
            """View the span of q, out and lse as [Hq, rows of blocks, tokens of a row, ...]."""
            whole = (x[sample, :, span[0] : span[1]] for x in (q, out, out if lse is None else lse))
            return [torch.unflatten(x, 1, (-1, rows)) for x in whole]

        def run(number: int) -> None:
            job = plan.jobs[number]
            n, rows, width = shapes[number]
            logits, last, weights, queries, result = views(n, rows, width)
            chosen = plan.blocks[job.first_block : job.first_block + n * width]
            job_keys = gather_keys(chosen).view(n, width * size, -1)
            job_values = gather_values(chosen).view(n, width * size, -1)
            places = list(zip(plan.heads[job.tasks], plan.rows[job.tasks], strict=True))
            q_rows, out_rows, lse_rows = by_row(job.sample, job.span, rows)
            for part, place in zip(queries.unbind(), places, strict=True):
                part.copy_(q_rows[place])
            # In powers of two, which are cheaper than those of e.
            factor = scale * _LOG2_E if softcap is None else scale / softcap
            torch.baddbmm(logits, queries, job_keys.mT, beta=0, alpha=factor, out=logits)
            if softcap is not None:
                logits.tanh_().mul_(softcap * _LOG2_E)
            # First to zero, for NaN would outlive a sum; the two together take a sixth of masked_fill_'s time.
            last.tril_(job.place).add_(future[job.place : job.place + rows])
            if window is not None:
                ages = plan.diagonals[job.tasks, None] - chosen.view(n, width)
                _hide_left_of_window(logits, ages, job.place, size, window)
            peak = logits.amax(-1, keepdim=True)
            if sink_logits is not None:
                peak = peak.maximum(sink_logits[job.tasks])
            total = logits.sub_(peak).exp2_().sum(-1, keepdim=True)
            if sink_logits is not None:
                total += (sink_logits[job.tasks] - peak).exp2_()
            if weigh == wide:
                torch.bmm(logits, job_values, out=result)
                result.div_(total)
            else:
                torch.mul(logits, total.reciprocal(), out=weights)
                torch.bmm(weights, job_values, out=result)
            for part, place in zip(result.unbind(), places, strict=True):
                out_rows[place].copy_(part)
            if lse is not None:
                sums = total.log2_().add_(peak).div_(_LOG2_E)[..., 0]
                for part, place in zip(sums.unbind(), places, strict=True):
                    lse_rows[place].copy_(part)

        return run

    run_jobs(len(plan.jobs), start)


def _rows(job: _Job, size: int) -> int:
    """Return the queries of each of a job's tasks: a block, or all of a span that is shorter."""
    return min(job.span[1] - job.span[0], size)


def multiplies_bfloat16(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the product with the values is one of bfloat16: it is fastest, and no less exact than SDPA."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _make_jobs(selection: BlockSelection, kv_heads: int) -> _Jobs:
    """Cut the tasks into jobs.

    What the jobs of a batch row are depends on that row alone, and so its numbers do, to the last bit.
    """
    grid, size = selection.grid, selection.block_size
    batch, heads, q_blocks = selection.counts.shape
    device = selection.counts.device
    # Whole rows are kind 0; a partial first or last row is alone in its kind.
    first = 1 if grid.offset % size or grid.q_len < size else 0
    last = q_blocks - 1 if grid.k_len % size and q_blocks > first else q_blocks
    spans = [
        (grid.q_span(start)[0], grid.q_span(stop - 1)[1]) if start < stop else (0, 0)
        for start, stop in ((first, last), (0, first), (last, q_blocks))
    ]
    starts = torch.tensor([first, 0, last], dtype=torch.int64, device=device)
    kinds = torch.zeros(q_blocks, dtype=torch.int32, device=device)
    kinds[:first] = 1
    kinds[last:] = 2

    sorted_keys, order = (selection.counts * 3 + kinds).flatten(1).sort(dim=1, descending=True, stable=True)
    limit = _JOB_LOGITS * cores_each()
    jobs = []
    stop = stop_block = 0
    for sample, keys in enumerate(sorted_keys):
        for key, length in zip(*(x.tolist() for x in keys.unique_consecutive(return_counts=True)), strict=True):
            width, kind = divmod(key, 3)
            rows = min(spans[kind][1] - spans[kind][0], size)
            place = (spans[kind][0] + grid.offset) % size
            step = max(1, limit // (rows * width * size))
            end = stop + length
            while stop < end:
                start, stop = stop, min(stop + step, end)
                jobs.append(_Job(sample, slice(start, stop), width, spans[kind], place, stop_block))
                stop_block += (stop - start) * width
    jobs.sort(key=lambda job: (job.tasks.stop - job.tasks.start) * job.width, reverse=True)

    samples = torch.arange(batch, dtype=torch.int64, device=device)[:, None]
    heads_of_all, rows_of_all = order // q_blocks, order % q_blocks
    first_blocks = (samples * kv_heads + heads_of_all // (heads // kv_heads)) * grid.k_blocks
    blocks = selection.indices.flatten(1, 2)[samples, order].add_(first_blocks[..., None].int())
    slots = torch.arange(blocks.shape[-1], dtype=torch.int32, device=device)
    blocks = blocks[slots < sorted_keys[..., None] // 3]
    diagonals = (first_blocks + rows_of_all + grid.first_block).int()
    task_rows = rows_of_all - starts[kinds.long()[rows_of_all]]
    return _Jobs(jobs, heads_of_all.flatten().tolist(), task_rows.flatten().tolist(), blocks, diagonals.flatten())


def _hide_left_of_window(logits: Tensor, ages: Tensor, place: int, size: int, window: int) -> None:
    """Set the logits of keys that have left the window to -inf.

    Args:
        logits: [tasks, rows, width * size], changed in place.
        ages: int [tasks, width], falling; blocks from a kept block to the task's query block.
        place: Of the first row in its block.
        size: Tokens a block.
        window: Tokens of the sliding window.
    """
    # The oldest blocks come first; the last query of a block does not see the first key of those beyond the edge.
    slots = int(((ages + 1) * size > window).sum(-1).max())
    key = torch.arange(size, dtype=torch.int32, device=logits.device)
    query = torch.arange(place, place + logits.shape[1], dtype=torch.int32, device=logits.device)
    distance = ages[:, None, :slots, None] * size + query[:, None, None] - key
    by_slot = torch.unflatten(logits, 2, (-1, size))
    by_slot[:, :, :slots].masked_fill_(distance >= window, -math.inf)


def _gatherer(blocks: Tensor, most: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what gathers at most so many blocks by their numbers into memory of its own, in a dtype."""
    room = torch.empty(most, blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    converted = room if dtype == blocks.dtype else torch.empty_like(room, dtype=dtype)

    def gather(chosen: Tensor) -> Tensor:
        gathered = torch.index_select(blocks, 0, chosen, out=room[: len(chosen)])
        return gathered if converted is room else converted[: len(chosen)].copy_(gathered)

    return gather


def _to_blocks(x: Tensor, size: int) -> Tensor:
    """Lay out keys or values as [B * Hkv * Kb, size * D], a partial last block padded with zeros."""
    batch, heads, length, dim = x.shape
    whole = -(-length // size) * size
    if x.is_contiguous() and length == whole:
        return x.view(-1, size * dim)
    laid = torch.empty(batch, heads, whole, dim, dtype=x.dtype, device=x.device)

    def run(number: int) -> None:
        sample, head = divmod(number, heads)
        laid[sample, head, :length] = x[sample, head]
        laid[sample, head, length:] = 0

    run_jobs(batch * heads, lambda: run)
    return laid.view(-1, size * dim)
