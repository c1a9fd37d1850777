"""Attend over the kept blocks: which kernel a call goes to, one part after the other or all of them packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stem_attn.backends.triton.attention_launches import Operands, launch_hopper, launch_portable
from stem_attn.backends.triton.devices import gluon_runs_on
from stem_attn.backends.triton.host_numbers import to_device
from stem_attn.backends.triton.layouts import describable, padded, unit_stride
from stem_attn.backends.triton.tiles import choose_hopper_tile
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Part

FEW_PARTS = 2
LONG_ROWS = 96
"""So few sequences, or sequences of so many rows (of all heads, on average), go one at a time on the Hopper kernel.

Others go in one launch of the portable kernel. Measured on an H200 (docs/log.md): two short ones are 1.15 to 1.7 times
as fast one at a time; of four and more those with 128 rows 1.4 to 1.6 times, with 64 .9, with 12 .24 to .5.
"""


def attend(
    call: Call,
    selections: Sequence[BlockSelection],
    out: Tensor,
    lse: Tensor | None,
    wanted: Tensor | None = None,
) -> None:
    """Attend over the kept blocks; see `Backend.attend`.

    Several sequences go in one launch of the portable kernel, or in one launch each; see `goes_in_one`.

    Args:
        call: The call.
        selections: The kept blocks of every part.
        out: [B, Hq, T, Dv].
        lse: float32 [B, Hq, T], or None.
        wanted: bool [] on the call's device: nothing is written unless it holds. None: it does.
    """
    parts = call.parts
    if len(parts) > 1:
        q, k, v, scale = addressable(call, call.q, call.k, call.v)
        if goes_in_one(call, hopper_fits(q, k, v, call.block_size, call.layout.page_size)):
            assert lse is None  # of packed and paged calls nobody can ask for it
            indices, counts, packing = _pack(call, selections, parts)
            where = 0, call.layout.block_table, packing
            operands = Operands(call, q, k, v, scale, indices, counts, out, None, *where, wanted)
            launch_portable(operands)
            return
        for part, selection in zip(parts, selections, strict=True):
            attend_part(call, part, selection, out[:, :, part.tokens], None, wanted)
        return
    attend_part(call, parts[0], selections[0], out, lse, wanted)


def goes_in_one(call: Call, fits: bool) -> bool:
    """Tell whether several sequences go in one launch of the portable kernel; `fits`: the Hopper kernel takes them."""
    count = len(call.parts)
    if count == 1 or not fits:
        return count > 1
    rows = sum(call.grid(part).q_blocks for part in call.parts) * call.q.shape[1]
    return count > FEW_PARTS and rows < LONG_ROWS * count


def attend_part(
    call: Call, part: Part, selection: BlockSelection, out: Tensor, lse: Tensor | None, wanted: Tensor | None = None
) -> None:
    """Attend within one part; out [B, Hq, Tq, Dv] and lse, float32 [B, Hq, Tq] contiguous, are the part's own."""
    q, k, v, scale = addressable(call, part.q, part.k, part.v)
    if hopper_fits(q, k, v, call.block_size, call.layout.page_size):
        rows = rows_of(selection), selection.counts
        launch_hopper(Operands(call, q, k, v, scale, *rows, out, lse, part.k_len, part.pages, None, wanted))
        return
    table = packing = None
    if part.pages is None:
        indices, counts = rows_of(selection), selection.counts
    else:  # what reads pages reads packed sequences, be it one
        table = part.pages[None]
        indices, counts, packing = _pack(call, [selection], [part])
    operands = Operands(call, q, k, v, scale, indices, counts, out, lse, part.k_len, table, packing, wanted)
    launch_portable(operands)


def hopper_fits(q: Tensor, k: Tensor, v: Tensor, block_size: int, page_size: int) -> bool:
    """Tell whether the Hopper kernel can take these operands; `page_size` is 0 where k and v are not in pages."""
    pads = padded(q.shape[3]), padded(v.shape[3])
    # At head dim 64 blocks of 64 have not been measured; above 128 two programs would not share a multiprocessor.
    sized = (block_size == 128 and min(pads) >= 64) or (block_size == 64 and pads == (128, 128))
    if not sized or q.element_size() != 2 or not all(map(describable, (q, k, v))):
        return False
    keys = choose_hopper_tile(block_size, *pads).keys
    return (page_size % keys == 0 or (keys % page_size == 0 and page_size >= 8)) and gluon_runs_on(q.device)


def addressable(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Copy what the kernels cannot address, and make the scale positive; return q, k, v and the scale."""
    scale = call.scale
    if scale <= 0:
        q, scale = q * scale, 1.0
    q, k, v = map(unit_stride, (q, k, v))
    return q, k, v, scale


def rows_of(selection: BlockSelection) -> Tensor:
    """Return a selection's indices, last stride 1; what keeps everything has one row for all."""
    if not selection.keeps_everything:
        return unit_stride(selection.indices)
    blocks = torch.arange(selection.grid.k_blocks, dtype=torch.int32, device=selection.counts.device)
    return blocks.expand(*selection.counts.shape, -1)


def _pack(
    call: Call, selections: Sequence[BlockSelection], parts: Sequence[Part]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Put the sequences' rows one after the other; return indices [1, Hq, R, S], counts [1, Hq, R] and `packing_of`."""
    width = max(s.indices.shape[-1] for s in selections)
    indices = torch.cat([torch.nn.functional.pad(s.indices, (0, width - s.indices.shape[-1])) for s in selections], 2)
    counts = torch.cat([s.counts for s in selections], 2)
    return indices, counts, packing_of(call, parts)


def packing_of(call: Call, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Say where each of several sequences starts: int32 row_sequence [R], first_rows, q_starts, k_starts."""
    starts: list[list[int]] = [[0], [0], [0]]
    row_sequence: list[int] = []
    for n, part in enumerate(parts):
        rows = call.grid(part).q_blocks
        row_sequence += [n] * rows
        for start, length in zip(starts, (rows, part.q_len, part.k_len), strict=True):
            start.append(start[-1] + length)
    table = torch.tensor([x for part in (row_sequence, *starts) for x in part], dtype=torch.int32, device="cpu")
    sizes = [len(row_sequence), *(len(start) for start in starts)]
    packing: tuple[Tensor, ...] = to_device(table, call.q.device).split(sizes)
    return packing
