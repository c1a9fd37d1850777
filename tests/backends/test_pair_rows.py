"""The lists of pairs of rows, as the Hopper kernel reads them for blocks of 64."""

import itertools
import random

import pytest
import torch

from stem_attn.call import Call
from stem_attn.layout import Layout

pytest.importorskip("triton")
attention = pytest.importorskip("stem_attn.backends.triton.attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2


def taken(order: list[int], tiles: list[int], half: int) -> tuple[list[int], list[int]]:
    """Walk a pair's tiles as one of the kernel's consumers does; return which tiles it takes, and their blocks."""
    second_alone, first_alone, both, of_first, of_second = order
    if half == 0:
        alone, before, own, others = first_alone, second_alone, of_first, of_second
    else:
        alone, before, own, others = second_alone, 0, of_second, of_first
    at = [before] * alone
    at += [second_alone + first_alone + n for n in range(both)]
    at += [second_alone + first_alone + both + n + min(n + 1 - half, others) for n in range(own)]
    return at, [tiles[i] for i in at]


@pytest.mark.parametrize(("rows", "first"), [(1, 0), (2, 0), (5, 3), (8, 0), (7, 20), (2, 700)])
@pytest.mark.parametrize("most", [0, 9, 600])
def test_each_row_finds_its_blocks(rows: int, first: int, most: int) -> None:
    draw = random.Random(rows)
    kept = [
        [
            sorted({first + row, *draw.sample(range(first + row), draw.randint(0, min(first + row, most)))})
            for row in range(rows)
        ]
        for _ in range(HEADS)
    ]
    width = max(len(blocks) for head in kept for blocks in head)
    indices = torch.full((1, HEADS, rows, width + 1), 1 << 30, dtype=torch.int32)  # nothing past a count is read
    counts = torch.zeros((1, HEADS, rows), dtype=torch.int32)
    for head in range(HEADS):
        for row, blocks in enumerate(kept[head]):
            indices[0, head, row, : len(blocks)] = torch.tensor(blocks)
            counts[0, head, row] = len(blocks)
    q = torch.zeros(1, HEADS, rows * 64, 64, device=DEVICE)
    k = torch.zeros(1, HEADS, (first + rows) * 64, 64, device=DEVICE)
    call = Call(Layout.dense(q, k, k), 64, 1.0)
    x = attention.Operands(call, q, k, k, 1.0, indices.to(DEVICE), counts.to(DEVICE), q, None, k.shape[2])
    lists = attention.pair_rows(x).tolist()
    for head in range(HEADS):
        for pair in range(-(-rows // 2)):
            order, tiles = lists[0][head][pair][:5], lists[0][head][pair][attention.HEADER :]
            for half in (0, 1):
                expected = kept[head][min(2 * pair + half, rows - 1)]
                at, blocks = taken(order, tiles, half)
                assert sorted(blocks) == expected
                assert blocks[0] == expected[-1]  # the one that is masked comes first
                assert all(after - before in (1, 2) for before, after in itertools.pairwise(at))
