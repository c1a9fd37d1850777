"""The Triton selection against the plain torch one: on a GPU, or in Triton's CPU interpreter where there is none."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import VECTORS, assert_same_blocks, load_vector, make_qkv, score_rounding
from stem_attn import BlockSelection, StemConfig
from stem_attn.blocks import BlockGrid
from stem_attn.budget import Budget, Budgets, budget_of
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_scores
from stem_attn.scoring import block_scores
from stem_attn.selection import select_top_blocks

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

DEVICE = "cuda" if GPU else "cpu"
SCALE = 0.25


@pytest.fixture(autouse=True)
def _poisoned_workspaces():
    """Fill every uninitialised tensor with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_config(**fields) -> StemConfig:
    """Keep about a fifth of the blocks, so that rows of a few blocks already choose."""
    small = {"block_size": 16, "budget_ratio": 0.15, "budget_bias": 1}
    return StemConfig(**{**small, "score": "linear", "budget_scope": "head", **fields})


def select(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, budget: Tensor | None = None, scale: float = SCALE
) -> BlockSelection:
    from stem_attn.backends.triton import TritonBackend

    call = make_call(q, k, v, config, scale)
    made = TritonBackend().select(call, call.parts[0], config, whole_budget(call, config, budget))
    return BlockSelection(made.indices.cpu(), made.counts.cpu(), made.block_size, made.q_len, made.k_len)


def make_call(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float = SCALE) -> Call:
    return Call(Layout.dense(*(x.to(DEVICE) for x in (q, k, v))), config.block_size, scale)


def lone_budget(config: StemConfig, blocks: Tensor) -> Budget:
    return Budget(Budgets((config,), blocks[None]), 0, blocks)


def whole_budget(call: Call, config: StemConfig, rows: Tensor | None) -> Budget:
    """The budget of a prompt whose last rows are given; by default what the config says."""
    if rows is None:
        return budget_of(config, call.parts[0].prompt_lens)
    before = call.grid(call.parts[0]).first_block
    return lone_budget(config, F.pad(rows, (before, 0), value=1))


def make_budget(q: Tensor, k: Tensor, config: StemConfig) -> Tensor:
    return budget_of(config, (k.shape[2],)).rows(BlockGrid(q.shape[2], k.shape[2], config.block_size))


def select_plainly(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, budget: Tensor | None = None) -> BlockSelection:
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    if budget is None:
        budget = make_budget(q, k, config)
    return select_top_blocks(block_scores(q, k, v, config, SCALE), budget, grid, config, k.shape[1])


def set_apart(q: Tensor) -> Tensor:
    """Make the first heads sharp and the last ones flat, so that they want different numbers of blocks."""
    return q * torch.linspace(3, 0.5, q.shape[1])[:, None, None]


def assert_equal(made: BlockSelection, expected: BlockSelection) -> None:
    assert torch.equal(made.counts, expected.counts)
    width = expected.indices.shape[-1]  # where heads share budgets, the kernels know a bound only
    assert torch.equal(made.indices[..., :width], expected.indices)
    assert bool((made.indices[..., width:] == -1).all())
    assert made.indices.dtype == made.counts.dtype == torch.int32
    assert (made.block_size, made.q_len, made.k_len) == (expected.block_size, expected.q_len, expected.k_len)


@pytest.mark.parametrize(
    ("fields", "q_len", "k_len", "shape"),
    [
        ({"stride": 4, "value_term": "none"}, 100, 200, {"dim": 24}),  # a prefix that ends inside a block
        ({"stride": 8, "forced_blocks": "on_top"}, 64, 160, {"heads": 3, "kv_heads": 1, "dim": 16, "v_dim": 40}),
        ({"stride": 2, "value_term": "zscore"}, 1, 150, {"batch": 2, "dim": 20}),
        ({"stride": 16, "value_term": "zscore", "sink_blocks": 0, "local_blocks": 1}, 111, 111, {"heads": 2}),
        ({"block_size": 32, "stride": 1}, 130, 290, {"heads": 2, "kv_heads": 2, "dim": 8}),
        ({"block_size": 64, "value_term": "zscore", "forced_blocks": "on_top"}, 500, 500, {"heads": 2, "dim": 80}),
        ({"block_size": 128, "local_blocks": 1, "value_weight": 3.0}, 1025, 1025, {"heads": 1, "kv_heads": 1}),
        ({"decay_from": "first_row", "budget_floor": 3}, 63, 144, {}),
        ({"value_term": "zscore"}, 9, 9, {}),  # one whole group has no deviation
    ],
)
def test_equals_the_plain_selection(fields, q_len, k_len, shape):
    config = make_config(**fields)
    q, k, v = make_qkv(q_len, k_len, **{"heads": 4, "kv_heads": 2, "dim": 32, **shape})
    assert_equal(select(q, k, v, config), select_plainly(q, k, v, config))


MASS: dict[str, object] = {"score": "mass"}
SHARED: dict[str, object] = {"budget_scope": "layer", "head_floor": 0.3, "budget_ratio": 0.3, "tail_blocks": 0}
SHARED |= {"sink_blocks": 0, "local_blocks": 1}


@pytest.mark.parametrize(
    ("fields", "q_len", "k_len", "shape"),
    [
        (MASS | {"stride": 4, "value_term": "none"}, 60, 137, {"dim": 24}),  # a prefix and runs that end early
        (MASS | SHARED | {"block_size": 32}, 100, 260, {"heads": 3, "kv_heads": 1, "dim": 16, "v_dim": 40}),
        (
            SHARED | MASS | {"block_size": 64, "stride": 64, "value_term": "zscore", "budget_ratio": 0.5},
            70,
            400,
            {"heads": 2, "dim": 40},
        ),
        (
            MASS | {"block_size": 64, "stride": 1, "spread_weight": 0.0},
            70,
            200,
            {"heads": 1, "kv_heads": 1, "dim": 256},
        ),
        (MASS | SHARED | {"stride": 2, "budget_scope": "group", "head_floor": 0.0}, 50, 150, {"batch": 2, "dim": 23}),
        (SHARED, 100, 200, {"heads": 6, "kv_heads": 3}),
        (SHARED | {"forced_blocks": "on_top", "value_term": "zscore"}, 33, 160, {"batch": 2}),
        (MASS | SHARED | {"forced_blocks": "on_top", "budget_scope": "group"}, 33, 160, {"heads": 3, "kv_heads": 1}),
        (MASS | SHARED, 1, 150, {}),
    ],
)
def test_masses_and_shared_budgets_equal_the_plain_selection(fields, q_len, k_len, shape):
    config = make_config(**fields)
    q, k, v = make_qkv(q_len, k_len, **{"heads": 4, "kv_heads": 2, "dim": 32, **shape})
    q = set_apart(q)
    made = select(q, k, v, config)
    assert_equal(made, select_plainly(q, k, v, config))
    if config.budget_scope != "head":
        alone = select(q, k, v, dataclasses.replace(config, budget_scope="head"))
        scopes = 1 if config.budget_scope == "layer" else k.shape[1]
        shares, sums = (s.counts.unflatten(1, (scopes, -1)) for s in (made, alone))
        assert torch.equal(shares.sum(2), sums.sum(2))
        assert q_len == 1 or not torch.equal(shares, sums)


@pytest.mark.parametrize("fields", [MASS, {}])
def test_a_negative_scale(fields):
    config = make_config(**fields)
    q, k, v = make_qkv(70, 170, dim=24)
    scores = block_scores(q, k, v, config, -SCALE)
    expected = select_top_blocks(scores, make_budget(q, k, config), BlockGrid(70, 170, 16), config, k.shape[1])
    assert_equal(select(q, k, v, config, scale=-SCALE), expected)


@pytest.mark.parametrize("fields", [MASS, {"value_term": "zscore"}, MASS | {"forced_blocks": "on_top"}])
def test_rows_of_many_lengths_and_some_too_long_for_registers(fields, monkeypatch):
    from stem_attn.backends.triton import pick_launches, selection

    config = make_config(**{**SHARED, "head_floor": 0.4, **fields})
    q, k, v = make_qkv(70, 170, heads=6, kv_heads=2)
    q = set_apart(q)
    expected = select_plainly(q, k, v, config)
    for name, value in (("FEWEST_COLUMNS", 4), ("CHOOSE_KEYS", 0)):  # a launch for 8 columns and one for 16; none
        selection._launches.cache_clear()
        monkeypatch.setattr(pick_launches, name, value)
        assert_equal(select(q, k, v, config), expected)
    selection._launches.cache_clear()


@pytest.mark.parametrize("held", [True, False])
def test_equal_scores_go_to_the_lower_head(held, monkeypatch):
    from stem_attn.backends.triton import pick_launches, selection

    if not held:
        monkeypatch.setattr(pick_launches, "CHOOSE_KEYS", 0)
    selection._launches.cache_clear()
    config = make_config(sink_blocks=0, local_blocks=1, value_term="none", budget_scope="layer", head_floor=0.5)
    q, k, v = (torch.zeros(1, h, 160, 16) for h in (3, 1, 1))
    made = select(q, k, v, config, torch.full((10,), 4, dtype=torch.int32))
    assert made.counts[0, :, 9].tolist() == [8, 2, 2]
    assert made.indices[0, 0, 9, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    selection._launches.cache_clear()


@pytest.mark.parametrize("layout", ["tokens_first", "tokens_last", "expanded"])
def test_any_strides(layout):
    config = make_config()
    q, k, v = make_qkv(60, 90, batch=2, heads=2, kv_heads=1)
    if layout == "expanded":
        k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    expected = select_plainly(q, k, v, config)
    if layout == "tokens_first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "tokens_last":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert_equal(select(q, k, v, config), expected)


@pytest.mark.parametrize("forced_blocks", ["inside", "on_top"])
@pytest.mark.parametrize("content", ["zeros", "constant", "two values"])
def test_ties_go_to_the_lower_index(forced_blocks, content):
    config = make_config(sink_blocks=0, local_blocks=1, forced_blocks=forced_blocks, value_term="none")
    q, k, v = (torch.full((1, 1, 160, 16), float(content != "zeros")) for _ in range(3))
    if content == "two values":
        k[:, :, 48:80] *= 2
    made = select(q, k, v, config, torch.full((10,), 4, dtype=torch.int32))
    best = [3, 4, 0, 1] if content == "two values" else [0, 1, 2, 3]
    expected = sorted({*best[:3], 9} if forced_blocks == "inside" else {*best, 9})
    assert made.indices[0, 0, 9, : made.counts[0, 0, 9]].tolist() == expected
    assert_equal(made, select_plainly(q, k, v, config, torch.full((10,), 4, dtype=torch.int32)))


def test_signed_zeros_tie():
    from stem_attn.backends.triton.selection_kernels import top_kernel

    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0, 1.0] + [0.0] * 11, device=DEVICE)
    keep = torch.tensor([0, 0, 0, 0, 0, 3], dtype=torch.int32, device=DEVICE)  # of the prompt's sixth row
    indices, counts = (torch.empty(n, dtype=torch.int32, device=DEVICE) for n in (4, 1))
    top_kernel[(1, 1)](
        *(scores, keep, indices, counts),
        *(0, 4, 0, 1, 1, 5, 16, 0, 0, 1),
        COLUMNS=16,
        INSIDE=True,
        SHARED=False,
        num_warps=1,
    )
    assert (indices.tolist(), counts.tolist()) == ([1, 2, 4, -1], [3])


@pytest.mark.parametrize("fields", [{"forced_blocks": "on_top"}, {"score": "mass", "budget_scope": "layer"}])
def test_a_budget_for_each_batch_row(fields):
    config = make_config(**fields)
    q, k, v = make_qkv(80, 150, batch=2, heads=2, kv_heads=1)
    grid = BlockGrid(80, 150, 16)
    budget = budget_of(config, (150, 800)).rows(grid)
    made = select(q, k, v, config, budget)
    assert_equal(made, select_plainly(q, k, v, config, budget))
    assert made.counts[0].sum() < made.counts[1].sum()


def test_passes_do_not_change_the_result(monkeypatch):
    from stem_attn.backends.triton import selection

    config = make_config()
    q, k, v = make_qkv(112, heads=2, kv_heads=1)
    expected = select_plainly(q, k, v, config)
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 2 * 16 * 4)  # three of the seven query blocks, two heads each
    call = make_call(q, k, v, config)
    assert len(selection.launches_for(call, call.parts[0], config).passes) == 3
    assert_equal(select(q, k, v, config), expected)


def test_passes_of_masses_do_not_change_the_result(monkeypatch):
    from stem_attn.backends.triton import selection

    config = make_config(score="mass", budget_scope="layer", head_floor=0.3)
    q, k, v = make_qkv(100, 120, heads=2, kv_heads=1)
    q = set_apart(q)
    expected = select_plainly(q, k, v, config)
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 2 * 16 * 4 * 2)  # every score is made of one mass
    call = make_call(q, k, v, config)
    assert len(selection.launches_for(call, call.parts[0], config).passes) == 3
    assert_equal(select(q, k, v, config), expected)


def pool(call, config):
    """Return the pooled blocks of a call's only part, and their powers of two."""
    from stem_attn.backends.triton import selection

    (part,) = call.parts
    launches = selection.launches_for(call, part, config)
    empty = {
        n: torch.empty(size, dtype=dtype, device=part.q.device) for n, (size, dtype) in launches.buffers(1).items()
    }
    launches.pool(part.q, part.k, part.v, part.pages, launches.operands(empty))
    return empty["pooled"], empty["table"]


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_keep_11_bits_at_any_magnitude(dtype, magnitude):
    if dtype == torch.float16 and magnitude != 1.0:
        pytest.skip("out of float16's range")
    config = make_config(stride=4, value_term="none")
    q, k, v = make_qkv(48, 176, heads=2, kv_heads=1)
    q, k, v = (q * magnitude).to(dtype), (k / magnitude).to(dtype), v.to(dtype)
    k[:, :, 100] *= 64  # an outlier token
    grid = BlockGrid(48, 176, 16)
    exact = reference_scores(q, k, v, config, scale=SCALE)
    call = make_call(q, k, v, config)
    pooled, scales = pool(call, config)
    assert pooled.dtype == torch.float16
    rows = (pooled.double() * scales.double()[: len(pooled), None]).cpu()
    q_rows, k_rows = rows[: 2 * grid.q_blocks].view(-1, 2, 128).transpose(0, 1), rows[2 * grid.q_blocks :]
    rounded = (q_rows @ k_rows.T)[None] * SCALE / 4
    causal = torch.arange(grid.k_blocks) <= grid.block_ids()[:, None]
    rounding = float((rounded - exact)[..., causal].abs().max())
    assert rounding < 2**-10 * float(exact[..., causal].abs().max())
    expected = select_top_blocks(exact.float(), make_budget(q, k, config), grid, config, k.shape[1]).to_mask()
    assert_same_blocks(select(q, k, v, config), expected, exact, rounding)


@pytest.mark.parametrize("magnitude", [0.01, 1.0, 20.0])
def test_spreads_and_means_share_a_power_and_keep_their_bits(magnitude):
    config = make_config(score="mass", stride=4, value_term="none")
    q, k, v = make_qkv(48, 176, heads=2, kv_heads=1, dtype=torch.bfloat16)
    k = k * magnitude  # at 20 a key's norm is above 100
    call = make_call(q, k, v, config)
    pooled, powers = pool(call, config)
    pooled, powers = pooled.double().cpu(), powers.double().cpu()
    queries = pooled[:12].view(3, 2, 2, 48) * powers[:6].view(3, 2, 1, 1)  # three blocks of two heads, two runs each
    keys = pooled[12:].view(3, 2, 4, 2, 48).transpose(1, 2).reshape(12, 4, 48)[:11]  # fours of blocks, pairs of runs
    keys *= powers[6:17].view(11, 1, 1)
    logits = queries.transpose(0, 1).reshape(2, 6, 48) @ keys.view(44, 48).T * SCALE
    means = q[0].double().unflatten(1, (6, 8)).mean(2)
    groups = k[0].double().unflatten(1, (44, 4))
    variance = groups.var(2, correction=0).unflatten(2, (2, 16)).sum(2)
    squares = means.square().unflatten(2, (2, 16)).mean(2)
    dots, spread = means @ groups.mean(2).mT * SCALE, squares @ variance.mT * SCALE**2 * config.spread_weight / 2
    torch.testing.assert_close(logits, dots + spread, rtol=0, atol=2**-10 * float(dots.abs().max() + spread.max()))


@pytest.mark.parametrize("path", VECTORS if GPU else VECTORS[-1:], ids=lambda p: p.stem)
def test_official_vectors(path):
    config, t = load_vector(path)
    q, k, v = t["q"], t["k"], t["v"]
    scale = q.shape[3] ** -0.5
    if not GPU:  # the interpreter takes long for all rows; the last two score every key block
        q = q[:, :, (k.shape[2] - 1) // config.block_size * config.block_size - config.block_size :]
    budget = make_budget(q, k, config)
    assert torch.equal(budget, t["budget"][-len(budget) :])
    made = select(q, k, v, config, budget, scale)
    exact = reference_scores(q, k, v, config, scale=scale)
    rounding = score_rounding(q, k, v, config, exact, scale)
    assert_same_blocks(made, t["mask"].bool()[:, :, -len(budget) :], exact, rounding)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_later_calls_at_other_addresses(offset):
    config = make_config(forced_blocks="on_top")
    q, k, v = make_qkv(500, 900, dim=64, dtype=torch.float16)
    expected = select(q, k, v, config)
    for _ in range(3):  # the second call and later ones skip Triton's own launch
        shifted = torch.empty(k.numel() + 8, dtype=k.dtype, device=DEVICE)[offset : offset + k.numel()].view(k.shape)
        shifted.copy_(k)
        assert_equal(select(q, shifted, v, config), expected)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_graph_follows_its_inputs():
    config = StemConfig()
    first, second = (make_qkv(4000, 6000, heads=8, dim=128, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    q, k, v = (x.to(DEVICE) for x in first)
    expected = [select(*inputs, config) for inputs in (first, second)]
    graph = torch.cuda.CUDAGraph()
    from stem_attn.backends.triton import TritonBackend

    with torch.cuda.graph(graph):
        call = make_call(q, k, v, config)
        made = TritonBackend().select(call, call.parts[0], config, budget_of(config, (6000,)))
    for inputs, wanted in zip((first, second), expected, strict=True):
        for x, new in zip((q, k, v), inputs, strict=True):
            x.copy_(new)
        graph.replay()
        assert torch.equal(made.indices.cpu(), wanted.indices)
        assert torch.equal(made.counts.cpu(), wanted.counts)


@pytest.mark.skipif(not GPU, reason="takes hours in the interpreter")
@pytest.mark.parametrize(
    ("preset", "k_len"),
    [("official", 16384), ("official", 20000), ("official", 1048576), ("default", 16384), ("default", 20000)],
)
def test_long_prompts(preset, k_len):
    config = StemConfig.preset(preset, budget_scope="head")
    q, k, v = make_qkv(8192, k_len, heads=2, kv_heads=1, dim=64)
    made = select(q, k, v, config)
    scores = block_scores(q, k, v, config, SCALE)
    # Both sides round in float32, each in its own order of summation.
    rounding = 2**-20 * float(scores[scores.isfinite()].abs().max())
    assert_same_blocks(made, select_plainly(q, k, v, config).to_mask(), scores, rounding)


def test_budgets_of_layers_and_chunks_share_what_they_can():
    """Layers that differ in their budget share launches, chunks of a prompt share its table."""
    from stem_attn.backends.triton import selection
    from stem_attn.backends.triton.keep_table import keep_tables

    q, k, v = make_qkv(16, 320, heads=2, kv_heads=1)
    layers = [make_config(score="mass", budget_scope="layer", budget_scale=1 + n / 100) for n in range(32)]
    launches, tables = set(), set()
    for stop in range(16, 321, 16):
        for config in layers:
            call = make_call(q, k[:, :, :stop], v[:, :, :stop], config)
            launches.add(selection.launches_for(call, call.parts[0], config))
            tables.add(selection.keep_table(budget_of(config, (320,)), 2, torch.device("cpu")))
    assert len(launches) == 20  # a chunk each
    assert len(tables) == 32  # a layer each
    before = selection._launches.cache_info().misses, keep_tables.cache_info().misses
    for config in layers:
        selection.launches_for(call, call.parts[0], config)
        selection.keep_table(budget_of(config, (320,)), 2, torch.device("cpu"))
    assert (selection._launches.cache_info().misses, keep_tables.cache_info().misses) == before


@pytest.mark.parametrize("rivals", [1, 2])
@pytest.mark.parametrize("prompts", [(320,), (330, 150)])
def test_tables_of_layers_lie_together(rivals, prompts):
    """Every layer reads what it would read alone, from a multiple of 16 bytes on."""
    from stem_attn.backends.triton.keep_table import keep_table

    layers = [make_config(budget_scope="layer", budget_scale=1 + n / 5, budget_bias=7 + rivals) for n in range(5)]
    for config in layers:
        budget_of(config, (17,))  # asked before: made together from now on
    budgets = [budget_of(config, prompts) for config in layers]
    tables = [keep_table(budget, rivals, torch.device("cpu")) for budget in budgets]
    assert len({id(table.tables) for table in tables}) == 1
    grid = BlockGrid(100, min(prompts), 16)
    for config, budget, table in zip(layers, budgets, tables, strict=True):
        alone = keep_table(lone_budget(config, budget.blocks), rivals, torch.device("cpu"))
        assert torch.equal(table.on_device(), alone.on_device())
        assert (table.on_device().data_ptr() - tables[0].on_device().data_ptr()) % 16 == 0
        assert (table.stride, table.least_at, table.width(grid)) == (alone.stride, alone.least_at, alone.width(grid))
    assert len({tuple(table.on_device().tolist()) for table in tables}) > 1


def test_a_table_remembers_some_chunks_only():
    from stem_attn.backends.triton.keep_table import CHUNKS, keep_table

    config = make_config()
    budget = budget_of(config, (320,))
    table = keep_table(budget, 1, torch.device("cpu"))
    chunks = [BlockGrid(end - start, end, 16) for end in range(16, 321, 16) for start in range(0, end, 16)]
    assert len(chunks) > 3 * CHUNKS
    for grid in chunks:
        most = budget.rows(grid).minimum(grid.block_ids().int() + 1)
        assert table.width(grid) == table.width(grid) == most.max()
        assert len(table.tables._widths) <= CHUNKS


def test_a_triton_that_lacks_what_the_kernels_use_is_told(monkeypatch):
    import triton

    from stem_attn import backends
    from stem_attn.backends.triton import TritonBackend

    with monkeypatch.context() as patch:  # no longer than this, since what is available is found out once a process
        patch.setattr(triton, "__version__", "3.2.0")
        reason = TritonBackend().why_unavailable()
    assert reason == "it needs Triton 3.4 or later, which PyTorch 2.8 brings; this is Triton 3.2.0"
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: (load(name)[0], reason) if name == "triton" else load(name))
    monkeypatch.setattr(TritonBackend, "automatic_on", ("cpu", "cuda"))
    q, k, v = make_qkv(32)
    before = backends.fallbacks().get(f"triton: {reason}", 0)
    assert backends.for_call("auto", Call(Layout.dense(q, k, v), 16, SCALE)).name == "cpu"
    assert backends.fallbacks()[f"triton: {reason}"] == before + 1
    with pytest.raises(RuntimeError, match=r"not available here: it needs Triton 3\.4"):
        backends.by_name("triton")
