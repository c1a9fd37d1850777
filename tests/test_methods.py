"""Baselines: one row a method, the same checks for all, and each estimate against a plain computation of its own."""

import dataclasses
import itertools
import math

import pytest
import torch

from helpers import SMALL, make_qkv
from stem_attn import (
    BlockSelection,
    StemConfig,
    block_sparse_attention,
    methods,
    select_blocks,
    stem_attention,
    stem_attention_varlen,
)
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.methods import Stem, estimates, masks
from stem_attn.methods.flexprefill import FlexPrefill
from stem_attn.methods.knob import match_density
from stem_attn.methods.minference import MInference
from stem_attn.methods.oracle import Oracle
from stem_attn.methods.uniform import Uniform
from stem_attn.reference import reference_attention

SIZE = 16
LENGTH = 960

# Settings that are sparse at a few hundred tokens in blocks of 16. One row a method.
SPARSE = {
    "stem": {f: getattr(SMALL, f) for f in ("block_size", "budget_ratio", "budget_bias", "tail_blocks")},
    "dense": {"block_size": SIZE},
    "oracle": {"block_size": SIZE, "density": 0.3},
    "uniform": {"config": SMALL},
    "a_shape": {"block_size": SIZE, "local_tokens": 60},
    "minference": {"block_size": SIZE, "vertical_tokens": 34, "slash_tokens": 103},
    "flexprefill": {"block_size": SIZE, "gamma": 0.5, "min_budget": 32},
    "xattention": {"block_size": SIZE, "threshold": 0.6},
    "flashprefill": {"block_size": SIZE, "alpha": 0.9, "last_blocks": 1},
}
VARIANTS = {
    "minference block-sparse": ("minference", {"block_size": SIZE, "pattern": "block_sparse", "top_blocks": 4}),
    "flexprefill query-aware": ("flexprefill", {"block_size": SIZE, "tau": 1.0, "gamma": 0.5, "min_budget": 32}),
    "oracle effect": ("oracle", {"block_size": SIZE, "density": 0.3, "measure": "effect", "scope": "head"}),
}
EVERY = {**{name: (name, params) for name, params in SPARSE.items()}, **VARIANTS}
# What looks back only, so that later tokens change nothing and chunks choose what one pass chooses.
CAUSAL = ("stem", "dense", "uniform", "a_shape", "minference block-sparse", "xattention", "flashprefill")


def build(row, **changes):
    name, params = EVERY[row]
    return methods.make(name, **{**params, **changes})


def structured(q_len, k_len=None, *, sharp=2.0, **options):
    """Random inputs whose attention is not nearly uniform."""
    q, k, v = make_qkv(q_len, k_len, **options)
    return sharp * q, k, v


def probabilities(q, k):
    """Dense attention in float64: [B, Hq, Tq, Tk]."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT / math.sqrt(q.shape[3])
    future = torch.ones(logits.shape[2:]).triu(k.shape[2] - q.shape[2] + 1).bool()
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def block_of(tokens):
    return torch.arange(tokens) // SIZE


def block_sums(x, grid):
    """Sum a [B, H, Tq, Tk] tensor over block pairs."""
    rows = torch.nn.functional.one_hot((torch.arange(grid.q_len) + grid.offset) // SIZE - grid.first_block)
    columns = torch.nn.functional.one_hot(block_of(grid.k_len))
    return rows.to(x.dtype).T @ x @ columns.to(x.dtype)


def test_every_method_is_in_the_registry_and_here():
    assert set(SPARSE) == set(methods.METHODS)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (63, 63), (111, 111), (129, 400), (5, 200), (400, 400)])
@pytest.mark.parametrize("row", EVERY)
def test_selections_are_valid(row, q_len, k_len):
    q, k, v = structured(q_len, k_len, batch=2, v_dim=24)
    method = build(row)
    selection = method.select(q, k, v, scale=0.2, prompt_len=k_len + 30)
    grid = BlockGrid(q_len, k_len, method.block_size)
    assert selection.grid == grid
    mask = selection.to_mask()
    assert mask.shape == (2, 4, grid.q_blocks, grid.k_blocks)
    again = BlockSelection.from_mask(mask, block_size=SIZE, q_len=q_len, k_len=k_len)  # causal, diagonal kept
    assert torch.equal(again.indices, selection.indices[..., : again.indices.shape[3]])
    out = block_sparse_attention(q, k, v, selection, scale=0.2)
    exact, _ = reference_attention(q, k, v, mask, SIZE, scale=0.2)
    torch.testing.assert_close(out, exact.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("row", EVERY)
def test_it_is_sparse_and_alike_in_any_batch(row):
    q, k, v = structured(LENGTH, batch=2)
    method = build(row)
    mask = method.select(q, k, v).to_mask()
    if row != "dense":
        assert 0.1 < method.select(q, k, v).density() < 0.7
    for b in range(2):
        alone = method.select(q[b : b + 1], k[b : b + 1], v[b : b + 1]).to_mask()
        assert torch.equal(alone[0], mask[b])


@pytest.mark.parametrize("row", EVERY)
def test_half_precision_and_strided_inputs(row):
    q, k, v = structured(200)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).bfloat16() for x in (q, k, v))
    selection = build(row).select(q, k, v)
    same = build(row).select(q.float(), k.float(), v.float())
    assert (selection.to_mask() != same.to_mask()).float().mean() < 0.02


@pytest.mark.parametrize("row", CAUSAL)
def test_chunks_choose_what_one_pass_chooses(row):
    q, k, v = structured(411, batch=2)
    method = build(row)
    whole = method.select(q, k, v).to_mask()
    cut = 15 * SIZE
    first = method.select(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], prompt_len=411).to_mask()
    assert torch.equal(first, whole[:, :, :15, :15])  # so later tokens change nothing
    rest = method.select(q[:, :, cut:], k, v).to_mask()
    assert torch.equal(rest, whole[:, :, 15:])


@pytest.mark.parametrize("row", sorted(set(EVERY) - set(CAUSAL)))
def test_the_others_do_not(row):
    q, k, v = structured(411)
    method = build(row)
    cut = 15 * SIZE
    first = method.select(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], prompt_len=411).to_mask()
    assert not torch.equal(first, method.select(q, k, v).to_mask()[:, :, :15, :15])


FINDERS = sorted(set(EVERY) - {"dense", "a_shape"})


def planted(structure):
    """Inputs of one head whose attention is almost all on a structure, and the blocks that hold it: bool [60, 60]."""
    tokens, dim = LENGTH, 64
    gen = torch.Generator().manual_seed(3)
    codes = torch.nn.functional.normalize(torch.randn(tokens, dim, generator=gen), dim=-1)
    q, k = 100 * codes, codes.clone()
    blocks = torch.zeros(60, 60, dtype=torch.bool)
    if structure == "vertical":
        k[83:88] = codes[85]
        q[96:] += 300 * codes[85]
        blocks[6:, 5] = True
    elif structure == "slash":
        for distance in (319, 321, 323):  # odd: the antidiagonals of even strides never meet an even distance
            q[distance:] += 300 * codes[:-distance]
        blocks[21:] = torch.eye(61, dtype=torch.bool)[1:40, :60]
    else:
        k[80:96] += codes[80]
        q[-3 * SIZE :] += 300 * codes[80]
        blocks[-3:, 5] = True
    v = torch.randn(tokens, dim, generator=gen)
    return q[None, None], k[None, None], v[None, None], blocks


@pytest.mark.parametrize("structure", ["vertical", "slash", "block"])
@pytest.mark.parametrize("row", FINDERS)
def test_planted_structures_are_found(row, structure):
    q, k, v, blocks = planted(structure)
    # 0.9 demands near ties; the published value is for structures.
    mask = build(row, **({"alpha": 0.1} if row == "flashprefill" else {})).select(q, k, v).to_mask()[0, 0]
    assert mask[blocks].all()
    rows = blocks.any(-1)
    assert mask[rows].sum() < 0.75 * torch.ones(60, 60).tril()[rows].sum()


@pytest.mark.parametrize(("measure", "sharp"), [("effect", 2.0), ("effect", 6.0), ("mass", 6.0)])
@pytest.mark.parametrize("row", sorted(set(EVERY) - {"dense", "oracle", "oracle effect"}))
def test_the_oracle_is_best_at_equal_density(row, measure, sharp):
    q, k, v = structured(LENGTH, sharp=sharp)
    dense = block_sparse_attention(q, k, v, build("dense").select(q, k, v))

    def error(selection):
        return (block_sparse_attention(q, k, v, selection) - dense).norm()

    for density in (0.3, 0.45):
        rival = match_density(build(row), q, k, v, density).select(q, k, v)
        oracle = Oracle(block_size=SIZE, density=rival.density(), measure=measure).select(q, k, v)
        assert oracle.density() == pytest.approx(rival.density(), abs=1e-4)
        assert error(oracle) < error(rival)


@pytest.mark.parametrize("row", sorted(set(EVERY) - {"dense"}))
def test_density_is_matched(row):
    q, k, v = structured(LENGTH, batch=2)
    method = build(row)
    densities = []
    for density in (0.3, 0.45):
        matched = match_density(method, q, k, v, density)
        densities.append(matched.select(q, k, v).density())
        # An int moves the density by up to a block a row.
        step = 0.03 if row in ("stem", "uniform", "a_shape") or "minference" in row else 0.005
        assert densities[-1] == pytest.approx(density, abs=step)
        assert type(matched) is type(method)
        changed = [f for f in dataclasses.fields(method) if getattr(matched, f.name) != getattr(method, f.name)]
        assert [f.name for f in changed] == [{"stem": "config"}.get(row) or method.knob.field]
    assert densities[0] < densities[1]


def test_density_out_of_reach_is_refused():
    q, k, v = structured(400)
    with pytest.raises(ValueError, match=r"FlashPrefill reaches densities from 0\.\d+ to 1\.0000 here with alpha"):
        match_density(build("flashprefill"), q, k, v, 0.1)
    with pytest.raises(ValueError, match="Dense has no knob"):
        match_density(build("dense"), q, k, v, 0.5)
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1\.5"):
        match_density(build("xattention"), q, k, v, 1.5)


def test_stem_keeps_its_decay_at_any_density():
    q, k, v = structured(800)
    matched = match_density(Stem(dataclasses.replace(SMALL, dense_below=5000)), q, k, v, 0.3)
    counts = matched.select(q, k, v).counts[0, 0]
    assert counts[-1] < 0.8 * counts.max()


DEFAULTS = {
    "stem": {"config": StemConfig()},
    "dense": {"block_size": 128},
    "oracle": {"block_size": 128, "density": 0.2, "measure": "mass", "scope": "layer"},
    "uniform": {"config": StemConfig(), "k": None},
    "a_shape": {"block_size": 128, "sink_tokens": 4, "local_tokens": 2000},
    "minference": {
        "block_size": 64,
        "pattern": "vertical_slash",
        "vertical_tokens": 1000,
        "slash_tokens": 6096,
        "top_blocks": 100,
        "last_queries": 64,
        "ratio": 1.0,
    },
    "flexprefill": {"block_size": 128, "gamma": 0.9, "tau": 0.1, "min_budget": 512},
    "xattention": {"block_size": 128, "stride": 8, "threshold": 0.9},
    "flashprefill": {"block_size": 128, "alpha": 0.1, "sink_blocks": 2, "local_blocks": 4, "last_blocks": 2},
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_published_defaults(name):
    method = methods.make(name)
    expected = DEFAULTS[name]
    assert {field: getattr(method, field) for field in expected} == expected
    if name != "stem":
        assert [f.name for f in dataclasses.fields(method)] == list(expected)


# What each field is changed to, from SPARSE or a variant; every one of them must change the selection.
CHANGES = {
    "oracle": {"block_size": 32, "density": 0.4, "measure": "effect", "scope": "head"},
    "uniform": {"config": dataclasses.replace(SMALL, stride=16), "k": 5},
    "a_shape": {"block_size": 32, "sink_tokens": 40, "local_tokens": 100},
    "minference": {
        "block_size": 32,
        "pattern": "block_sparse",
        "vertical_tokens": 60,
        "slash_tokens": 200,
        "last_queries": 8,
        "ratio": 2.0,
    },
    "minference block-sparse": {"top_blocks": 5},
    "flexprefill": {"block_size": 32, "gamma": 0.9, "tau": 1.0, "min_budget": 64},
    "xattention": {"block_size": 32, "stride": 4, "threshold": 0.8},
    "flashprefill": {"block_size": 32, "alpha": 0.95, "sink_blocks": 4, "local_blocks": 6, "last_blocks": 4},
}


@pytest.mark.parametrize(("row", "field"), [(row, field) for row, fields in CHANGES.items() for field in fields])
def test_every_field_has_an_effect(row, field):
    q, k, v = structured(LENGTH)
    before = build(row).select(q, k, v)
    after = build(row, **{field: CHANGES[row][field]}).select(q, k, v)
    assert before.block_size != after.block_size or not torch.equal(before.to_mask(), after.to_mask())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sparse", {}, "unknown method 'sparse'; known: stem, dense, .*flashprefill"),
        ("xattention", {"tau": 1}, "unknown parameter of xattention: tau; known: block_size, stride, threshold"),
        ("stem", {"tau": 1}, "unknown config field tau"),
        ("stem", {"preset": "fast"}, "unknown preset 'fast'"),
        ("dense", {"block_size": 24}, "multiple of 16, got 24"),
        ("dense", {"block_size": 256}, "from 16 to 128, got 256"),
        ("xattention", {"stride": 12}, "stride must divide block_size 128, got 12"),
        ("xattention", {"threshold": 1.5}, "threshold must be a number from 0 to 1, got 1.5"),
        ("a_shape", {"local_tokens": 0}, "local_tokens must be an int from 1"),
        ("minference", {"pattern": "cross"}, "pattern must be one of vertical_slash, block_sparse, got 'cross'"),
        ("oracle", {"scope": "model"}, "scope must be one of head, layer, got 'model'"),
        ("oracle", {"measure": None}, "measure must be one of mass, effect, got None"),
        ("flexprefill", {"gamma": "x"}, "gamma must be a number"),
        ("flashprefill", {"alpha": True}, "alpha must be a number"),
        ("uniform", {"k": 0}, "k must be an int from 1"),
        ("uniform", {"config": {}}, "config must be a StemConfig, got dict"),
    ],
)
def test_wrong_names_and_values_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        methods.make(name, **params)


def test_inputs_are_checked():
    q, k, v = make_qkv(64)
    with pytest.raises(ValueError, match="query heads must be a multiple"):
        build("xattention").select(q[:, :3], k, v)
    with pytest.raises(ValueError, match="prompt_len must be"):
        build("xattention").select(q, k, v, prompt_len=3)


# Each estimate against a plain computation.


@pytest.mark.parametrize(("q_len", "k_len"), [(111, 111), (75, 200)])
@pytest.mark.parametrize("tile", [2**24, 3000])
def test_mass_is_that_of_dense_attention(monkeypatch, q_len, k_len, tile):
    monkeypatch.setattr(estimates, "_TILE_NUMBERS", tile)
    q, k, _ = structured(q_len, k_len, batch=2)
    grid = BlockGrid(q_len, k_len, SIZE)
    sums = block_sums(probabilities(q, k), grid)
    mass = estimates.attention_mass(q, k, grid, 32**-0.5)
    torch.testing.assert_close(mass.double(), sums / sums.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tile", [2**24, 3000])
def test_effect_is_the_fall_of_the_error(monkeypatch, tile):
    monkeypatch.setattr(estimates, "_TILE_NUMBERS", tile)
    q, k, v = structured(75, 96, v_dim=24)
    grid = BlockGrid(75, 96, SIZE)
    effect = Oracle(block_size=SIZE, measure="effect").scores(q, k, v, grid, 32**-0.5)
    p = probabilities(q, k)
    values = v.double().repeat_interleave(2, 1)
    exact = p @ values
    blocks = block_of(96)
    for h in range(4):
        for row in range(grid.q_blocks):
            queries, diagonal = slice(*grid.q_span(row)), grid.first_block + row
            mass = [float(p[0, h, queries, blocks == j].sum()) for j in range(diagonal)]
            order = [diagonal, *sorted(range(diagonal), key=lambda j: -mass[j])]
            errors = []
            for count in range(1, len(order) + 1):
                kept = torch.isin(blocks, torch.tensor(order[:count]))
                weights = p[0, h, queries] * kept
                out = weights @ values[0, h] / weights.sum(-1, keepdim=True)
                errors.append(float((out - exact[0, h, queries]).square().sum()))
            falls = [a - b for a, b in itertools.pairwise(errors)]
            assert effect[0, h, row, diagonal] == math.inf
            for place, block in enumerate(order[1:]):
                assert float(effect[0, h, row, block]) == pytest.approx(max(falls[place:]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("q_len", "k_len", "stride"), [(128, 128, 8), (112, 208, 4), (101, 109, 8)])
def test_strided_mass_is_the_softmax_of_antidiagonal_means(q_len, k_len, stride):
    q, k, _ = structured(q_len, k_len, heads=1, kv_heads=1)
    grid = BlockGrid(q_len, k_len, SIZE)
    logits = (q.double() @ k.double().mT)[0, 0] / math.sqrt(32)
    first, last = grid.offset // stride, -(-k_len // stride)
    sums = torch.zeros(grid.q_blocks, grid.k_blocks, dtype=torch.float64)
    for a in range(first, last):
        means = torch.zeros(a + 1, dtype=torch.float64)
        for b in range(a + 1):
            for s in range(stride):
                i, j = a * stride + stride - 1 - s - grid.offset, b * stride + s
                if 0 <= i < q_len and j < k_len:
                    means[b] += logits[i, j] / stride
        for b, share in enumerate(means.softmax(0)):
            sums[a * stride // SIZE - grid.first_block, b * stride // SIZE] += share
    mass = estimates.attention_mass(q, k, grid, 32**-0.5, stride=stride)[0, 0]
    torch.testing.assert_close(mass.double(), sums / sums.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)


def test_xattention_covers_its_threshold_with_the_fewest_blocks():
    q, k, v = structured(400)
    method = build("xattention")
    grid = BlockGrid(400, 400, SIZE)
    mass = method.scores(q, k, v, grid, 32**-0.5)
    mask = method.select(q, k, v).to_mask()
    assert mask[..., 0].all()
    kept = (mass * mask).sum(-1)
    assert (kept >= method.threshold - 1e-5).all()
    free = mask & ~masks.forced_blocks(grid, 1, 1, q.device)
    least = mass.masked_fill(~free, torch.inf).amin(-1)
    assert ((kept - least)[free.any(-1)] < method.threshold + 1e-5).all()
    assert build("xattention", threshold=1).select(q, k, v).density() == 1


@pytest.mark.parametrize(("q_len", "k_len"), [(111, 111), (40, 200), (5, 100)])
@pytest.mark.parametrize("tile", [2**24, 3000])
def test_last_attention_by_key_and_by_distance(monkeypatch, q_len, k_len, tile):
    monkeypatch.setattr(estimates, "_TILE_NUMBERS", tile)
    q, k, _ = structured(q_len, k_len, batch=2)
    vertical, slash = estimates.last_attention(q, k, 20, 32**-0.5)
    p = probabilities(q, k)[:, :, -20:]
    torch.testing.assert_close(vertical.double(), p.mean(2), atol=1e-6, rtol=1e-4)
    by_distance = torch.zeros_like(p)
    for i in range(p.shape[2]):
        query = k_len - p.shape[2] + i
        by_distance[:, :, i, : query + 1] = p[:, :, i, : query + 1].flip(-1)
    torch.testing.assert_close(slash.double(), by_distance.mean(2), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("q_len", "k_len"), [(320, 320), (330, 330), (129, 400)])
def test_minference_keeps_the_blocks_of_its_lines_and_says_how_much_that_adds(q_len, k_len):
    q, k, v = structured(q_len, k_len, batch=2)
    method = build("minference", slash_tokens=110, ratio=1.4)
    before, after = method.densities(q, k, v)
    p = probabilities(q, k)[:, :, -64:]
    grid = BlockGrid(q_len, k_len, SIZE)
    rows, columns = torch.arange(q_len)[:, None] + grid.offset, torch.arange(k_len)
    distance = rows - columns
    vertical, slash = estimates.last_attention(q, k, 64, 32**-0.5)
    torch.testing.assert_close(vertical.double(), p.mean(2), atol=1e-6, rtol=1e-4)
    vertical[..., :30], slash[..., :100] = 9, 9
    lines = torch.zeros(2, 4, q_len, k_len, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            top_columns = vertical[b, h].topk(47).indices
            top_distances = slash[b, h].topk(154).indices
            lines[b, h] = torch.isin(columns, top_columns)[None] | torch.isin(distance, top_distances)
    lines &= distance >= 0
    assert before == pytest.approx(int(lines.sum()) / (8 * int((distance >= 0).sum())), rel=1e-9)
    mask = method.select(q, k, v).to_mask()
    touched = block_sums(lines.double(), grid) > 0
    assert mask[touched].all()
    whole = slice(1 if grid.offset % SIZE else 0, q_len // SIZE)  # partial rows may keep a block too many
    assert torch.equal(mask[:, :, whole], touched[:, :, whole])
    assert after == pytest.approx(method.select(q, k, v).density(), rel=1e-9)
    assert before < after


def test_minference_block_sparse_keeps_the_best_pooled_blocks():
    q, k, v = structured(320, heads=2, kv_heads=1)
    method = build("minference block-sparse")
    pooled = q.unflatten(2, (20, SIZE)).mean(3) @ k.unflatten(2, (20, SIZE)).mean(3).mT
    mask = method.select(q, k, v).to_mask()
    for h in range(2):
        for row in range(20):
            best = pooled[0, h, row, : row + 1].topk(min(4, row + 1)).indices.tolist()
            assert mask[0, h, row].nonzero().flatten().tolist() == sorted({*best, row})
    before, after = method.densities(q, k, v)
    assert before == after == pytest.approx(method.select(q, k, v).density())


def flexprefill_by_hand(q, k, method):
    """One head without a prefix, in float64: mask and divergence."""
    tokens, size = q.shape[2], method.block_size
    n = tokens // size
    p = probabilities(q, k)[0, 0, -size:]
    vertical = p.mean(0)
    slash = torch.stack([p[i, : tokens - size + i + 1].flip(0).mul(1 / size) for i in [0]]).new_zeros(tokens)
    for i in range(size):
        query = tokens - size + i
        slash[: query + 1] += p[i, : query + 1].flip(0) / size

    def count(x):
        covered = x.sort(descending=True).values.cumsum(0)
        return max(int((covered < method.gamma).sum() + 1) // size + 1, -(-method.min_budget // size))

    q_mean, k_mean = (x[0, 0].double().unflatten(0, (n, size)).mean(1) for x in (q, k))
    estimate = (k_mean @ q_mean[-1] / math.sqrt(q.shape[3])).softmax(0)
    true = vertical.unflatten(0, (n, size)).sum(1)
    mean = (estimate + true) / 2
    divergence = ((estimate * (estimate / mean).log() + true * (true / mean).log()).sum() / 2).sqrt()
    columns, distances = count(vertical), count(slash)
    aware = divergence < method.tau
    if aware:
        columns = distances = -(-method.min_budget // size)
    by_column, by_distance = true.clone(), slash.unflatten(0, (n, size)).sum(1)
    by_column[0] = by_distance[0] = 9
    best_columns, best_distances = by_column.topk(min(columns, n)).indices, by_distance.topk(min(distances, n)).indices
    mask = torch.zeros(n, n, dtype=torch.bool)
    future = torch.ones(n, n).triu(1).bool()
    pooled = (q_mean @ k_mean.T / math.sqrt(q.shape[3])).masked_fill(future, -torch.inf).softmax(-1)
    order = pooled.flatten().argsort(descending=True)
    before = pooled.flatten()[order].cumsum(0) - pooled.flatten()[order]
    chosen = order[before < method.gamma * n]
    for i in range(n):
        for j in range(i + 1):
            mask[i, j] = i == j or bool((best_columns == j).any()) or bool((best_distances == i - j).any())
            mask[i, j] |= bool(aware) and bool((chosen == i * n + j).any())
    return mask, divergence


@pytest.mark.parametrize(("tau", "sharp"), [(0.0, 2.0), (1.0, 2.0), (0.1, 0.1)])
@pytest.mark.parametrize("gamma", [0.3, 0.7])
def test_flexprefill_by_hand(gamma, tau, sharp):
    q, k, v = structured(320, sharp=sharp, heads=1, kv_heads=1)
    method = FlexPrefill(block_size=SIZE, gamma=gamma, tau=tau, min_budget=40)
    expected, divergence = flexprefill_by_hand(q, k, method)
    grid = BlockGrid(320, 320, SIZE)
    estimate = method.estimate(q, k, v, grid, 32**-0.5)
    torch.testing.assert_close(estimate.divergence[0, 0].double(), divergence, atol=1e-4, rtol=1e-4)
    assert torch.equal(method.select(q, k, v).to_mask()[0, 0], expected)


@pytest.mark.parametrize(("q_len", "k_len"), [(330, 330), (129, 400)])
def test_flashprefill_by_hand(q_len, k_len):
    q, k, v = structured(q_len, k_len, heads=2, kv_heads=1)
    method = build("flashprefill")
    mask = method.select(q, k, v).to_mask()
    grid = BlockGrid(q_len, k_len, SIZE)
    for h in range(2):
        for row in range(grid.q_blocks):
            diagonal = grid.first_block + row
            start, stop = grid.q_span(row)
            means = k[0, 0, : diagonal * SIZE].double().unflatten(0, (diagonal, SIZE)).mean(1) if diagonal else None
            kept = {*range(min(2, diagonal + 1)), *range(max(diagonal - 3, 0), diagonal + 1)}
            if diagonal:
                energy = (q[0, h, start:stop].double() @ means.T / math.sqrt(32)).exp().sum(0)
                kept |= set((energy >= 0.9 * energy.max()).nonzero().flatten().tolist())
            if diagonal == grid.k_blocks - 1:
                kept = set(range(grid.k_blocks))
            assert mask[0, h, row].nonzero().flatten().tolist() == sorted(kept)


def test_a_shape_keeps_sinks_and_windows():
    q, k, v = make_qkv(110, 205)
    mask = build("a_shape", sink_tokens=20).select(q, k, v).to_mask()[0, 0]
    rows, columns = torch.arange(110)[:, None] + 95, torch.arange(205)
    wanted = (rows >= columns) & ((columns < 20) | (rows - columns < 60))
    assert torch.equal(mask, block_sums(wanted.double()[None, None], BlockGrid(110, 205, SIZE))[0, 0] > 0)


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
def test_uniform_costs_what_its_config_costs(preset):
    config = StemConfig.preset(preset, block_size=SIZE)
    for tokens in (2000, 4096):
        q, k, v = make_qkv(tokens, heads=1, kv_heads=1, dim=16)
        wanted = select_blocks(q, k, v, config=config).density()
        method = Uniform(config=config)
        nearest = [
            abs(Uniform(config=config, k=method.equal_cost_k(tokens) + d).select(q, k, v).density() - wanted)
            for d in (-1, 0, 1)
        ]
        assert nearest[1] <= min(nearest) + 0.004  # forced blocks on top are counted by their bound
        counts = method.select(q, k, v).counts
        most = method.equal_cost_k(tokens) + (8 if config.forced_blocks == "on_top" else 0)
        assert int(counts.max()) <= most


def test_uniform_is_085_of_the_first_rows_budget():
    # Far above the plateau of short rows, Eq. 4's k_uni is 0.85 k_start.
    config = StemConfig.preset("paper", block_size=SIZE, budget_ratio=0.05, budget_floor=1)
    tokens = 400 * SIZE
    start = int(budget_of(config, (tokens,)).blocks[0])
    assert Uniform(config=config).equal_cost_k(tokens) == pytest.approx(0.85 * start, abs=1)


def test_uniform_gives_each_batch_row_its_own_k():
    q, k, v = make_qkv(400, batch=2)
    method = build("uniform")
    both = method.select(q, k, v, prompt_len=[400, 4000]).to_mask()
    for b, n in enumerate([400, 4000]):
        assert torch.equal(both[b], method.select(q[:1], k[:1], v[:1], prompt_len=n).to_mask()[0]) or b
    assert int(both[0].sum()) < int(both[1].sum())


def test_covered_before():
    mass = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.0])
    before = masks.covered_before(mass)
    torch.testing.assert_close(before, torch.tensor([0.9, 0.0, 0.4, 0.7, 2.0]))
    first = torch.tensor([True, False, False, False, False])
    torch.testing.assert_close(masks.covered_before(mass, first), torch.tensor([-1.0, 0.1, 0.5, 0.8, 2.0]))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_the_oracle_keeps_an_exact_share(scope):
    q, k, v = structured(640, batch=2)
    method = Oracle(block_size=SIZE, density=0.3, scope=scope)
    mask = method.select(q, k, v).to_mask()
    causal = torch.ones(40, 40).tril().bool()
    start = {"layer": 1, "head": 2}[scope]
    kept, available = mask.flatten(start).sum(-1), causal.expand_as(mask).flatten(start).sum(-1)
    assert torch.equal(kept, (0.3 * available).round().long())
    scores = method.scores(q, k, v, BlockGrid(640, 640, SIZE), 32**-0.5)
    diagonal = torch.eye(40, dtype=torch.bool)
    worst = scores.masked_fill(~mask | diagonal, torch.inf).flatten(start).amin(-1)
    best_left = scores.masked_fill(mask | ~causal, 0).flatten(start).amax(-1)
    assert (worst >= best_left).all()


def test_a_prompt_of_32k_tokens_needs_no_square_of_it():
    # 32K x 32K float32 would be 4 GiB a head; the largest tensor here is a tile, or [B, H, Qb, Kb].
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    q, k, v = make_qkv(200, 32768, heads=2, kv_heads=1, dim=16)
    rivals = [build(row, **({"block_size": 32} if row not in ("uniform", "stem") else {})) for row in EVERY]
    with Watch():
        for method in rivals:
            method.select(q, k, v)
    assert largest <= 4 * estimates._TILE_NUMBERS


def test_minference_has_one_pattern_for_all_heads():
    q, k, v = structured(320)
    lines = MInference(block_size=SIZE, ratio=0).select(q, k, v).to_mask()
    assert (
        lines[..., : 30 // SIZE + 1].logical_or(~torch.ones(20, 20).tril().bool()[:, :2]).all()
    )  # the first 30 tokens


@pytest.mark.parametrize("asked", [{"residual": "mean"}, {"precision": "fp8"}])
@pytest.mark.parametrize("make", [Stem, lambda config: Uniform(config=config)])
def test_a_method_asks_for_no_attention_that_it_would_not_get(make, asked):
    q, k, v = (torch.randn(1, 1, 256, 32) for _ in range(3))
    chooses, [(name, value)] = make(StemConfig(**asked)), asked.items()
    message = f"the method's config asks for {name}='{value}'"
    with pytest.raises(ValueError, match=message):
        stem_attention(q, k, v, method=chooses)
    with pytest.raises(ValueError, match=message):
        stem_attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens_q=[0, 256], method=chooses)
    assert select_blocks(q, k, v, method=chooses).q_len == 256  # nothing is attended to
    if name == "residual":
        assert stem_attention(q, k, v, method=chooses, config=StemConfig(**asked)).shape == q.shape
