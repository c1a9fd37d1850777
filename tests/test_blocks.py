import pytest
import torch

from stem_attn import BlockSelection
from stem_attn.blocks import BlockGrid


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (63, 63), (64, 64), (100, 100), (10, 100), (40, 100), (1, 65)])
def test_grid_rows_cover_every_query_once(q_len, k_len):
    grid = BlockGrid(q_len, k_len, 16)
    spans = [grid.q_span(row) for row in range(grid.q_blocks)]
    assert [t for start, stop in spans for t in range(start, stop)] == list(range(q_len))
    for row, (start, stop) in enumerate(spans):
        assert {(grid.offset + t) // 16 for t in range(start, stop)} == {grid.first_block + row}
    causal = torch.arange(grid.k_blocks) <= grid.block_ids()[:, None]
    assert grid.causal_blocks == int(causal.sum())


def random_mask(batch, heads, grid, seed=0):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < 0.3
    columns = torch.arange(grid.k_blocks)
    return (mask & (columns <= grid.block_ids()[:, None])) | (columns == grid.block_ids()[:, None])


def test_mask_round_trip_and_layout():
    grid = BlockGrid(150, 333, 32)
    mask = random_mask(2, 3, grid)
    selection = BlockSelection.from_mask(mask, block_size=32, q_len=150, k_len=333)
    assert torch.equal(selection.to_mask(), mask)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    for row, count in zip(selection.indices.flatten(0, 2).tolist(), selection.counts.flatten().tolist(), strict=True):
        assert row[:count] == sorted(set(row[:count]))
        assert all(j >= 0 for j in row[:count])
        assert set(row[count:]) <= {-1}
    kept, causal = int(mask.sum()), 2 * 3 * grid.causal_blocks
    assert selection.density() == pytest.approx(kept / causal)


def test_from_mask_refuses_what_attention_cannot_mean():
    grid = BlockGrid(64, 64, 16)
    mask = random_mask(1, 1, grid)
    lengths = {"block_size": 16, "q_len": 64, "k_len": 64}
    future, no_diagonal = mask.clone(), mask.clone()
    future[0, 0, 1, 2] = True
    no_diagonal[0, 0, 2, 2] = False
    with pytest.raises(ValueError, match="future"):
        BlockSelection.from_mask(future, **lengths)
    with pytest.raises(ValueError, match="diagonal"):
        BlockSelection.from_mask(no_diagonal, **lengths)
    with pytest.raises(ValueError, match=r"bool \[B, Hq, 4, 4\]"):
        BlockSelection.from_mask(mask[..., :3], **lengths)
    with pytest.raises(ValueError, match="bool"):
        BlockSelection.from_mask(mask.int(), **lengths)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33, 1000])
@pytest.mark.parametrize(("q_len", "k_len"), [(100, 100), (37, 100), (5, 100), (1, 1)])
def test_band_keeps_exactly_the_blocks_that_the_window_touches(window, q_len, k_len):
    grid = BlockGrid(q_len, k_len, 16)
    band = BlockSelection.band(
        batch=1, heads=1, window=window, block_size=16, q_len=q_len, k_len=k_len, device="cpu"
    ).to_mask()[0, 0]
    for row in range(grid.q_blocks):
        start, stop = grid.q_span(row)
        keys = {j for i in range(grid.offset + start, grid.offset + stop) for j in range(max(0, i - window + 1), i + 1)}
        assert band[row].nonzero().flatten().tolist() == sorted({j // 16 for j in keys})
