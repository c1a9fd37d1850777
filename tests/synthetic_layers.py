"""Made-up layers of any size, with attention that looks like attention: a sink, a diagonal, columns, and noise."""

import torch

from stem_attn.blocks import BlockGrid
from stem_attn.lab.inspect.pack import rows_to_show
from stem_attn.lab.inspect.report import numbers
from stem_attn.lab.inspect.run import STEPS, Found, Kept, Layer, Outcome
from stem_attn.lab.machine import describe
from stem_attn.plots import strength


def found(*, layers, heads, tokens, block_size, methods=1, share=0.25, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = BlockGrid(tokens, tokens, block_size)
    rows = rows_to_show(grid.k_blocks, layers * heads)
    made = Found(grid, rows)
    places, columns = torch.tensor(rows)[:, None], torch.arange(grid.k_blocks)
    future = columns > places
    for index in range(layers):
        logits = torch.randn(heads, len(rows), grid.k_blocks, generator=generator)
        logits += 1.5 * torch.randn(heads, 1, grid.k_blocks, generator=generator)
        logits += 5 * torch.exp(-(places - columns).clamp(min=0) / 2) + 4 * (columns == 0)
        mass = logits.masked_fill_(future, -torch.inf).softmax(-1)
        kept = [_kept(mass, logits, places, columns, share / (1 + i), generator) for i in range(methods)]
        steps = (strength(mass) * STEPS).round().to(torch.uint8)
        made.layers.append(Layer(index, steps, kept, 0.02))
    seconds = dict.fromkeys(range(layers), 0.01)
    made.outcomes = [
        Outcome(share / (1 + i), layers, 0.98 - 0.1 * i, 0.01, 2.0, seconds, seconds) for i in range(methods)
    ]
    return made


def _kept(mass, logits, places, columns, share, generator):
    noisy = logits + 0.5 * torch.randn(logits.shape, generator=generator)
    order = noisy.argsort(-1, descending=True).argsort(-1)
    blocks = (order < (share * (places + 1)).ceil()) | (columns == places)
    blocks &= columns <= places
    density = blocks.sum((1, 2)) / (places + 1).sum()
    return Kept(blocks, (mass * ~blocks).sum(-1), density.tolist(), 0.1)


def record(made, **model):
    """The record that the command would write of it."""
    names = ["first", "second"][: len(made.outcomes)]
    return {
        "command": "inspect",
        "arguments": "inspect",
        "date": "2026-01-01 00:00:00+0000",
        "machine": describe(torch.device("cpu")),
        "settings": {
            "block_size": made.grid.block_size,
            "rows": len(made.rows),
            "methods": {name: {} for name in names},
        },
        "model": {"name": "made up", "dtype": "float32", **model},
        "prompt": {"tokens": made.grid.k_len, "source": "nothing"},
        **numbers(made, names),
    }
