"""Layers as a page carries them: four bits of attention mass and one of each method a block, deflated, in base64."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.lab.inspect.run import Found, Layer

PAGE_BYTES = 187 * 10**5
"""Of the layers on one page: more is slow to open and to send."""
_MOST_BLOCKS = 36 * 10**6  # of all heads, as many as 32 x 32 heads have of 32K tokens in blocks of 128
_THUMBNAIL = 24


def rows_to_show(k_blocks: int, heads: int, wanted: int | None = None) -> list[int]:
    """Choose query blocks to show: all if a page can hold them, otherwise evenly spaced ones up to the last.

    Args:
        k_blocks: Blocks of the prompt.
        heads: Of all layers together.
        wanted: At most so many.
    """
    fitting = _MOST_BLOCKS * 2 // ((k_blocks + 1) * heads)
    count = max(1, min(k_blocks, fitting, wanted or k_blocks))
    return sorted({k_blocks - 1 - i * k_blocks // count for i in range(count)})


def fewer_rows(found: Found) -> Found:
    """Return what was found with every second row that is shown, the last one among them."""
    picked = list(range(len(found.rows)))[::-2][::-1]
    layers = [
        dataclasses.replace(
            layer,
            mass=layer.mass[:, picked],
            kept=[
                dataclasses.replace(one, blocks=one.blocks[:, picked], lost=one.lost[:, picked]) for one in layer.kept
            ],
        )
        for layer in found.layers
    ]
    return dataclasses.replace(found, rows=[found.rows[i] for i in picked], layers=layers)


def packed(found: Found) -> tuple[Found, list[str]]:
    """Pack all layers, with fewer rows where they would be too large for a page.

    Returns:
        What of it is on the page, and a text a layer; see `pack_layer`.
    """
    while True:
        texts = [pack_layer(layer, found.rows) for layer in found.layers]
        if sum(map(len, texts)) <= PAGE_BYTES or len(found.rows) == 1:
            return found, texts
        found = fewer_rows(found)


def pack_layer(layer: Layer, rows: Sequence[int]) -> str:
    """Pack one layer.

    Only blocks that are not in the future are there: of every head, row by row, columns 0 to the row's own. First the
    mass, two blocks a byte, the earlier one in the low bits; then a bit a block of every method, lowest bit first; then
    the lost attention of every method, head and row in 255ths. Each part begins at a byte.
    """
    causal = torch.arange(layer.mass.shape[2]) <= torch.tensor(list(rows))[:, None]
    parts = [_nibbles(layer.mass[:, causal].flatten())]
    parts += [_bits(one.blocks[:, causal].flatten()) for one in layer.kept]
    parts += [(one.lost * 255).round().to(torch.uint8).flatten() for one in layer.kept]
    return _text(torch.cat(parts))


def thumbnails(found: Found) -> dict[str, Any]:
    """Return small pictures of all heads: the strongest mass of every patch, and the kept share of its blocks.

    Returns:
        `size`, the pixels [height, width] of a picture, and `data`: of every layer, head and pixel a byte with the mass
        (0 to 15), then for every method the same with the kept share (0 to 255).
    """
    size = min(_THUMBNAIL, len(found.rows)), min(_THUMBNAIL, found.grid.k_blocks)
    small = [shrunk(layer, found.rows, size) for layer in found.layers]
    planes = [mass for mass, _ in small]
    for method in range(len(found.layers[0].kept)):
        planes += [(255 * kept[method]).round() for _, kept in small]
    return {"size": size, "data": _text(torch.cat([plane.flatten() for plane in planes]).to(torch.uint8))}


def shrunk(layer: Layer, rows: Sequence[int], size: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Shrink the pictures of a layer's heads.

    Returns:
        The strongest mass of every patch, in steps, and of every method the share of its blocks that is kept: float32
        [H, *size] each.
    """
    causal = torch.arange(layer.mass.shape[2]) <= torch.tensor(list(rows))[:, None]
    blocks = F.adaptive_avg_pool2d(causal[None].float(), size).clamp(min=1e-9)
    kept = [F.adaptive_avg_pool2d(one.blocks.float(), size) / blocks for one in layer.kept]
    return F.adaptive_max_pool2d(layer.mass.float(), size), [share.clamp(max=1) for share in kept]


def _nibbles(steps: Tensor) -> Tensor:
    pairs = F.pad(steps, (0, len(steps) % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _bits(flags: Tensor) -> Tensor:
    eights = F.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.int64).to(torch.uint8)


def _text(content: Tensor) -> str:
    return base64.b64encode(zlib.compress(content.numpy().tobytes(), 6)).decode()
