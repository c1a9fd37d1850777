import resource

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


@pytest.mark.parametrize("window", [0, -3, 2.0, None])
def test_a_band_needs_a_window(window):
    with pytest.raises(ValueError, match=f"window must be an int of at least 1, got {window}"):
        BlockSelection.band(batch=1, heads=1, window=window, block_size=16, q_len=40, k_len=40, device="cpu")


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


def made_by_hand(change=None):
    """Two heads over three blocks; `change` edits indices and counts in place."""
    indices = torch.tensor([[[[0, -1, -1], [0, 1, -1], [0, 1, 2]], [[0, -1, -1], [1, -1, -1], [0, 2, -1]]]]).int()
    counts = torch.tensor([[[1, 2, 3], [1, 1, 2]]]).int()
    if change:
        change(indices, counts)
    return BlockSelection(indices, counts, 16, 48, 48)


def test_a_selection_made_outside_is_what_it_says():
    selection = made_by_hand()
    kept = [[0], [0, 1], [0, 1, 2]], [[0], [1], [0, 2]]
    mask = selection.to_mask()[0]
    assert [[row.nonzero().flatten().tolist() for row in head] for head in mask] == [list(head) for head in kept]


def put(index, value):
    def change(indices, counts):
        indices[index] = value

    return change


def count(index, value):
    def change(indices, counts):
        counts[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put((0, 0, 2), torch.tensor([1, 0, 2])), "must rise"),
        (put((0, 0, 2), torch.tensor([1, 1, 2])), "must rise"),
        (put((0, 0, 2), torch.tensor([0, 1, 3])), "last kept block of a row must be its diagonal one"),
        (put((0, 1, 2), torch.tensor([0, 1, -1])), "last kept block of a row must be its diagonal one"),
        (put((0, 0, 1), torch.tensor([-2, 1, -1])), "at least 0"),
        (put((0, 0, 1, 2), 2), "slots past a row's count must hold -1"),
        (count((0, 0, 1), 0), "counts must lie from 1 to the 3 slots"),
        (count((0, 0, 1), -1), "counts must lie from 1 to the 3 slots"),
        (count((0, 0, 2), 4), "counts must lie from 1 to the 3 slots"),
        (count((0, 0, 2), 2), "diagonal|-1"),
    ],
)
def test_bad_rows_are_refused_and_named(change, message):
    with pytest.raises(ValueError, match=f"({message}).* head [01] of batch row 0"):
        made_by_hand(change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": torch.zeros(1, 1, 1, 1)}, "indices must be int32"),
        ({"indices": None}, "indices must be int32 .* got NoneType"),
        ({"counts": torch.ones(1, 1, dtype=torch.int32)}, "counts must be int32"),
        ({"counts": torch.ones(1, 2, 1, dtype=torch.int32)}, "rows"),
        ({"q_len": 17, "k_len": 17}, r"rows \[B, Hq, 2\]"),
        ({"q_len": 17, "k_len": 16}, "q_len <= k_len"),
        ({"indices": torch.zeros(1, 1, 1, 0, dtype=torch.int32)}, "from 1 to the 0 slots"),
    ],
)
def test_bad_forms_are_refused(arguments, message):
    good = {
        "indices": torch.zeros(1, 1, 1, 1, dtype=torch.int32),
        "counts": torch.ones(1, 1, 1, dtype=torch.int32),
        "block_size": 16,
        "q_len": 16,
        "k_len": 16,
    }
    BlockSelection(**good)
    with pytest.raises(ValueError, match=message):
        BlockSelection(**{**good, **arguments})


@pytest.mark.parametrize(("q_len", "k_len"), [(100, 100), (37, 100), (1, 1)])
def test_everything_is_all_causal_blocks(q_len, k_len):
    grid = BlockGrid(q_len, k_len, 16)
    selection = BlockSelection.everything(batch=2, heads=3, grid=grid, device="cpu")
    mask = (torch.arange(grid.k_blocks) <= grid.block_ids()[:, None]).expand(2, 3, -1, -1)
    assert selection.keeps_everything
    assert selection.density() == 1.0
    assert torch.equal(selection.to_mask(), mask)
    again = BlockSelection(selection.indices, selection.counts, 16, q_len, k_len)  # it keeps the contract
    assert torch.equal(again.to_mask(), mask)


def test_everything_costs_no_indices():
    """128K tokens in blocks of 16: 8192 x 8192 indices would take 256 MiB."""
    grid = BlockGrid(1 << 17, 1 << 17, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    selection = BlockSelection.everything(batch=1, heads=32, grid=grid, device="cpu")
    assert selection.density() == 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
