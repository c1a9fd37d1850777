import pytest
import torch

from stem_attn import StemConfig, block_sparse_attention
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.lab.equal_density import UnreachableDensityError, enclosing_budgets, select_at_density
from stem_attn.lab.named_methods import NamedMethod

BLOCK = 16
OFFICIAL = NamedMethod("stem-official", "stem-official")


def qkv(tokens=1024, seed=0):
    """Heads that attend to some keys far more than to others."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, 32, generator=generator) for heads in (4, 2, 2))
    return 3 * q, k, v


@pytest.mark.parametrize("name", ["stem-official", "stem-default", "stem-paper", "uniform", "xattention", "oracle"])
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_methods_reach_the_density(name, density):
    q, k, v = qkv()
    choices = select_at_density(NamedMethod(name, name), BLOCK, density, q, k, v, None)
    reached = [choice.selection.density() for choice in choices]
    if name.startswith("stem") or name == "uniform":
        assert reached[0] <= density <= reached[-1]
        # Neighbouring budgets differ by at most one block a row.
        rows = BlockGrid(1024, 1024, BLOCK)
        assert reached[-1] - reached[0] <= rows.q_blocks / rows.causal_blocks
    else:
        assert reached == [pytest.approx(density, abs=0.005)]


def test_official_keeps_scoring_decay_and_forced_blocks():
    q, k, v = qkv()
    for choice in select_at_density(OFFICIAL, BLOCK, 0.4, q, k, v, None):
        config = choice.method.config
        official = StemConfig.preset("official", block_size=BLOCK)
        for name in ("stride", "value_term", "value_weight", "decay", "decay_from", "sink_blocks", "local_blocks",
                     "forced_blocks"):  # fmt: skip
            assert getattr(config, name) == getattr(official, name)
        # Without the forced blocks on top, the first row beyond the budget keeps it all, and the last one 0.7 of it.
        budget = budget_of(config, (1024,)).rows(choice.selection.grid)
        assert int(budget[config.budget_bias]) == config.budget_bias
        assert int(budget[-1]) == int(0.7 * config.budget_bias)


def test_bounds_enclose_what_forced_blocks_on_top_give():
    q, k, v = qkv()
    grid = BlockGrid(1024, 1024, BLOCK)
    config = StemConfig.preset("official", block_size=BLOCK)
    low, high = enclosing_budgets(config, grid, 0.4)
    below, above = select_at_density(OFFICIAL, BLOCK, 0.4, q, k, v, None)
    assert low <= below.method.config.budget_bias < above.method.config.budget_bias <= high
    assert above.method.config.budget_bias == below.method.config.budget_bias + 1


def test_too_little_is_said():
    q, k, v = qkv()
    with pytest.raises(UnreachableDensityError, match=r"stem-official keeps at least 0\.25\d\d of .*, not 0.05"):
        select_at_density(OFFICIAL, BLOCK, 0.05, q, k, v, None)


def test_a_method_of_some_rows_keeps_everything_in_the_others():
    q, k, v = qkv()
    early = NamedMethod("early", "stem-official", rows=(0.0, 0.5))
    below, above = select_at_density(early, BLOCK, 0.9, q, k, v, None)
    assert below.selection.density() <= 0.9 <= above.selection.density()
    causal = torch.arange(1, 65)
    assert (below.selection.counts[..., 32:] == causal[32:]).all()
    assert (below.selection.counts[..., :32] < causal[:32]).any()


@pytest.mark.parametrize("base", ["stem-default", "uniform"])
@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("rows", [(0.0, 1.0), (0.25, 1.0)])
def test_a_choice_attends_as_its_config_asks(base, density, rows):
    q, k, v = qkv()

    def choice(**asked):
        config = StemConfig(block_size=BLOCK, **asked)
        fields = {"config": config} if base == "uniform" else asked
        return select_at_density(NamedMethod(base, base, fields, rows), BLOCK, density, q, k, v, None)[0]

    means = choice(residual="mean")
    out = block_sparse_attention(q, k, v, means.selection, residual="mean")
    torch.testing.assert_close(means.attend(q, k, v, None), out, rtol=0, atol=0)
    with pytest.raises(ValueError, match="precision='fp8'"):  # no CPU computes it: asked for, and not dropped
        choice(precision="fp8").attend(q, k, v, None)
