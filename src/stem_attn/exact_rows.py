"""Attend exactly with single query rows, in plain torch, compare with what was kept and came out, and add up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.layout import Part

_TILE_NUMBERS = 2**24  # of float32 in the largest tensor of a tile, 64 MiB


def compare_rows(call: Call, part: Part, selection: BlockSelection, out: Tensor, places: Tensor) -> Tensor:
    """See `Backend.compare_rows`. Memory is rows x keys, in tiles."""
    keys, values = part.gather()
    batch, kv_heads, k_len, dim = keys.shape
    group, grid = part.q.shape[1] // kv_heads, call.grid(part)
    dtype = torch.promote_types(part.q.dtype, torch.float32)
    found = torch.empty(3, *places.shape, dtype=dtype, device=places.device)
    numbers = k_len * max(group * places.shape[2], dim)
    step = max(_TILE_NUMBERS // numbers, 1)
    for b in range(batch):
        for first in range(0, kv_heads, step):
            kv, q = slice(first, first + step), slice(first * group, (first + step) * group)
            at = places[b, q]
            query, given = (torch.take_along_dim(x[b, q], at[..., None], 1).to(dtype) for x in (part.q, out))
            share, exact = _attend(call, q, query, keys[b, kv].to(dtype), values[b, kv].to(dtype), at + grid.offset)
            by_block = F.pad(share, (0, grid.k_blocks * grid.block_size - k_len))
            by_block = by_block.view(*at.shape, grid.k_blocks, grid.block_size).sum(3)
            row = (at + grid.offset) // grid.block_size - grid.first_block
            kept = torch.take_along_dim(selection.indices[b, q], row[..., None], 1).long()
            recall = by_block.gather(2, kept.clamp(min=0)).where(kept >= 0, 0).sum(2)
            if call.sinks is not None:
                whole = by_block.sum(2)
                recall = (recall / whole).where(whole != 0, 1)
            found[0, b, q] = recall
            found[1, b, q] = (given - exact).square().sum(2)
            found[2, b, q] = exact.square().sum(2)
    return found


def strata(q_len: int, count: int) -> Tensor:
    """Return the edges of equal stretches of the queries: int64 [count + 1] on the host."""
    return torch.arange(count + 1, device="cpu") * q_len // count


def add_up(found: Tensor, q_len: int) -> Tensor:
    """See `Backend.add_up`."""
    cells = found.double().view(*found.shape[:3], -1, 2)  # [3, B, Hq, strata, 2]
    sizes = strata(q_len, cells.shape[3]).diff().double().to(found.device)
    recall, lost, power = (cells.mean(4) * sizes).flatten(1).sum(1)
    split = (cells[..., 0] - cells[..., 1]) * (sizes / 2)
    spread = torch.stack((split[0], split[1] - lost / power * split[2])).square().nan_to_num(0.0).flatten(1)
    variance, squares = spread.sum(1), spread.square().sum(1)
    return torch.stack((recall, variance[0], squares[0], lost, power, variance[1], squares[1]))


def _attend(call: Call, which: slice, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Attend exactly, as the call's properties say. This alone knows what they mean.

    Args:
        call: The call.
        which: Which of the call's query heads these are.
        q: [Hq, R, D].
        k: [Hkv, Tk, D].
        v: [Hkv, Tk, Dv].
        places: int64 [Hq, R]; positions of the queries among the keys.

    Returns:
        Probabilities [Hq, R, Tk] and outputs [Hq, R, Dv].
    """
    heads, rows, _ = q.shape
    together = len(k), heads // len(k) * rows
    logits = (q.reshape(*together, -1) * call.scale) @ k.mT
    if call.softcap is not None:
        logits = logits.div_(call.softcap).tanh_().mul_(call.softcap)
    place, key = places.view(*together, 1), torch.arange(k.shape[1], device=k.device)
    hidden = key > place
    if call.window is not None:
        hidden |= key <= place - call.window
    logits.masked_fill_(hidden, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks[which].to(logits.dtype).repeat_interleave(rows).view(*together, 1)
        share = torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1]
    else:
        share = torch.softmax(logits, -1)
    return share.view(heads, rows, -1), (share @ v).view(heads, rows, -1)
