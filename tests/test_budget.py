import pytest
import torch

from stem_attn import StemConfig
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.reference import reference_budget


def block_budget(config, prompt_len, grid):
    return budget_of(config, (prompt_len,)).rows(grid)


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
@pytest.mark.parametrize("blocks", [1, 30, 55, 56, 57, 64, 100, 128, 159, 160, 256, 1000])
def test_equals_the_reference(preset, blocks):
    config = StemConfig.preset(preset)
    length = blocks * 128 - 5
    budget = block_budget(config, length, BlockGrid(length, length, 128))
    assert budget.tolist() == reference_budget(config, length)


def test_official_by_hand():
    config = StemConfig.preset("official")

    def rows(blocks):
        return block_budget(config, blocks * 128, BlockGrid(blocks * 128, blocks * 128, 128)).tolist()

    assert rows(55) == [55] * 55  # below 56 blocks everything is kept
    assert rows(100)[:50] == [50] * 50  # int(0.2 * 100 + 30), until row 50
    assert rows(100)[50:53] == [50, 49, 49]
    assert rows(100)[-1] == 35  # 0.7 * 50
    assert rows(1000)[0] == 130  # int(0.1 * 1000 + 30)
    assert rows(1000)[-1] == 91


def test_paper_by_hand():
    config = StemConfig.preset("paper")
    n = 1024  # 128K tokens: k_start = 102.4, k(i) = floor(102.4 - 102.4 * 0.3 / 1024 * i) = floor(102.4 - 0.03 i)
    budget = block_budget(config, n * 128, BlockGrid(n * 128, n * 128, 128)).tolist()
    assert [budget[i] for i in (0, 10, 14, 1023)] == [102, 102, 101, 71]
    floor = block_budget(config, 32768, BlockGrid(32768, 32768, 128)).tolist()
    assert floor == [54] * 256  # 0.1 n is less than the least total
    short = block_budget(config, 8191, BlockGrid(8191, 8191, 128)).tolist()
    assert short == [54] * 64  # at any length: what is too short is an adapter's to say


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, [62, 63]), (0.5, [31, 32]), (0.0, [15, 15])])
def test_the_last_rows_of_the_prompt_keep_more(ratio, kept):
    config = StemConfig(block_size=16, tail_blocks=2, tail_ratio=ratio)
    plain = StemConfig(block_size=16, tail_blocks=0)
    grid = BlockGrid(1000, 1000, 16)
    budget, without = block_budget(config, 1000, grid), block_budget(plain, 1000, grid)
    assert budget[-2:].tolist() == kept
    assert torch.equal(budget[:-2], without[:-2])
    assert int(without.max()) < 63


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
def test_a_chunk_has_the_rows_of_the_whole_prompt(preset):
    config = StemConfig.preset(preset, block_size=32)
    whole = block_budget(config, 20000, BlockGrid(20000, 20000, 32))
    for q_len, k_len in [(512, 512), (512, 9000), (77, 12345), (1, 20000)]:
        grid = BlockGrid(q_len, k_len, 32)
        chunk = block_budget(config, 20000, grid)
        assert torch.equal(chunk, whole[grid.first_block : grid.k_blocks])


def test_rows_of_a_batch_have_budgets_of_their_own():
    config = StemConfig(block_size=16)
    grid = BlockGrid(80, 150, 16)
    both = budget_of(config, (150, 800)).rows(grid)
    for row, n in zip(both, (150, 800), strict=True):
        assert torch.equal(row, block_budget(config, n, grid))


def test_default_keeps_what_its_budget_gives_at_any_length():
    """4000 tokens are 32 blocks: a tenth of them plus 12 for the first rows, .85 of that for the last."""
    kept = block_budget(StemConfig(tail_blocks=0), 4000, BlockGrid(4000, 4000, 128))
    assert (int(kept.min()), int(kept.max())) == (12, 15)


def test_nobodys_context_leaks_into_the_cached_budgets():
    for n, context in enumerate((torch.device("meta"), torch.inference_mode())):
        with context:
            made = budget_of(StemConfig(budget_bias=20 + n), (9000,)).blocks
        assert made.device.type == "cpu"
        assert torch.equal(made, torch.tensor(reference_budget(StemConfig(budget_bias=20 + n), 9000)))


def test_prompts_of_as_many_blocks_share_a_budget():
    """A server's prompts have many lengths: what follows from a budget is made once for all of as many blocks."""
    config = StemConfig(block_size=16)
    assert budget_of(config, (1001,)) is budget_of(config, (1008,))
    assert budget_of(config, (1001,)) is not budget_of(config, (1009,))
    assert budget_of(config, (1001, 90)) is budget_of(config, (1004, 96))


def test_what_layers_will_ask_for_is_made_at_once():
    layers = [StemConfig(block_size=16, budget_scale=1 + n / 10, budget_bias=9) for n in range(6)]
    first = [budget_of(config, (777,)) for config in layers]
    second = [budget_of(config, (1500,)) for config in reversed(layers)]
    assert len({id(budget.of_layers) for budget in first}) == 6  # nobody knew of the others yet
    assert len({id(budget.of_layers) for budget in second}) == 1
    for config, budget in zip(reversed(layers), second, strict=True):
        assert budget.config == config
        assert budget.blocks.tolist() == reference_budget(config, 1500)
        assert budget_of(config, (1500,)) is budget
    assert budget_of(StemConfig(block_size=16, budget_bias=8), (1500,)).of_layers is not second[0].of_layers


def test_a_budget_that_another_thread_has_just_made_is_that_one(monkeypatch):
    from stem_attn import budget

    class Behind(dict):
        """Looks as it did before the other thread was done, once."""

        def get(self, key):
            return None if key not in seen and not seen.add(key) else super().get(key)

    config = StemConfig(block_size=16, budget_bias=7)
    made, seen = budget_of(config, (777,)), set()
    monkeypatch.setattr(budget, "_kept", Behind(budget._kept))
    assert budget_of(config, (777,)) is made


@pytest.mark.parametrize("decay_from", ["plateau", "first_row"])
@pytest.mark.parametrize(
    "fields",
    [
        {"budget_scale": 1e9},
        {"budget_scale": 1.7e308},
        {"budget_bias": 1 << 40},
        {"budget_bias": 10**400},
        {"budget_floor": 1 << 40},
        {"tail_blocks": 1 << 80, "budget_ratio": 0.0},
    ],
)
def test_budgets_beyond_32_bits_keep_everything(fields, decay_from):
    config = StemConfig(block_size=16, decay_from=decay_from, **fields)
    assert budget_of(config, (777,)).blocks.tolist() == reference_budget(config, 777)


def test_a_budget_that_cannot_be_made_does_not_come_back(monkeypatch):
    from stem_attn import budget

    fits, not_yet = (StemConfig(block_size=16, budget_bias=11, budget_scale=scale) for scale in (1.0, 2.0))
    make = budget._prompt_budget
    with monkeypatch.context() as patch:
        patch.setattr(budget, "_prompt_budget", lambda configs, n: [][0] if not_yet in configs else make(configs, n))
        with pytest.raises(IndexError):
            budget_of(not_yet, (500,))
        assert budget_of(fits, (500,)).blocks.tolist() == reference_budget(fits, 500)
    assert budget_of(not_yet, (500,)).blocks.tolist() == reference_budget(not_yet, 500)


def test_what_keeps_everything_is_told_by_layer():
    layers = [StemConfig(block_size=16, budget_scale=scale, budget_bias=2, tail_blocks=1) for scale in (0.5, 1.0, 5.0)]
    for prompts in ((640,), (640, 320)):
        for config in (*layers, *layers):
            budget = budget_of(config, prompts)
            for q_len, k_len in [(16, 16), (80, 80), (640, 640), (320, 640), (16, 640), (32, 640)]:
                grid = BlockGrid(q_len, k_len, 16)
                rows = grid.block_ids() + 1
                assert budget.keeps_everything(grid) == bool((budget.rows(grid) >= rows).all())


def test_budgets_kept_are_bounded(monkeypatch):
    from stem_attn import budget

    monkeypatch.setattr(budget, "_kept", {})
    monkeypatch.setattr(budget, "_asked", {})
    monkeypatch.setattr(budget, "KEPT", 40)
    monkeypatch.setattr(budget, "LAYERS", 8)
    monkeypatch.setattr(budget, "FAMILIES", 3)
    for length in range(100, 1000, 16):
        for n in range(20):
            config = StemConfig(block_size=16, budget_bias=n % 5, budget_scale=1 + n / 10)
            assert budget_of(config, (length,)).blocks.tolist() == reference_budget(config, length)
            assert len(budget._asked) <= 3
            assert len(budget._kept) <= 40
            assert all(len(alike) <= 8 for alike in budget._asked.values())
