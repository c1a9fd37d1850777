import dataclasses

import pytest
import torch

from stem_attn import StemConfig
from stem_attn.lab.tune.levels import allocate, follow, interpolate, levels, spread, toward

LENGTH = 384
CONFIG = StemConfig(block_size=16, stride=4)


def test_levels_rise_to_everything_and_scales_give_them():
    found = levels(CONFIG, LENGTH)
    densities = [level.density for level in found]
    assert densities == sorted(set(densities))
    assert densities[-1] == 1.0
    for preset in ("official", "paper"):
        config = StemConfig.preset(preset, block_size=16, budget_floor=1)
        assert levels(config, 2048)[-1].density == 1.0
        assert len(levels(config, 2048)) > 50
    assert levels(dataclasses.replace(CONFIG, budget_bias=0, budget_ratio=0.0), LENGTH) == []


def test_a_bias_beyond_all_floats_has_levels_too():
    assert [step.density for step in levels(dataclasses.replace(CONFIG, budget_bias=10**400), LENGTH)][-1] == 1


def test_spread_holds_both_ends():
    assert spread(3, 10) == [0, 1, 2]
    found = spread(100, 10)
    assert (found[0], found[-1]) == (0, 99)
    assert found[1] - found[0] < found[-1] - found[-2]


def test_interpolation_passes_through_what_was_measured_and_never_rises():
    densities = [0.1, 0.2, 0.3, 0.5, 1.0]
    filled = interpolate([0.4, 0.5, 0.1, 0.0], [0, 1, 3, 4], densities)
    assert filled.tolist() == pytest.approx([0.4, 0.4, (0.4**2 * 0.1) ** (1 / 3), 0.1, 0.0])


def test_allocation_is_the_best_of_all():
    densities = [0.1, 0.2, 0.4, 1.0]
    curve = torch.tensor([0.5, 0.3, 0.1, 0.0], dtype=torch.float64)
    damage = torch.stack([curve, 10 * curve, 0.1 * curve])
    for mean_density in (0.1, 0.2, 0.3, 0.5, 1.0):
        chosen = allocate(damage, densities, mean_density)
        used = sum(densities[level] for level in chosen) / 3
        assert used <= mean_density + 1e-12
        cost = sum(float(row[level]) for row, level in zip(damage, chosen, strict=True))
        every = torch.cartesian_prod(*[torch.arange(4)] * 3)
        for other in every.tolist():
            if sum(densities[level] for level in other) / 3 <= used + 1e-12:
                assert sum(float(row[level]) for row, level in zip(damage, other, strict=True)) >= cost - 1e-12
    assert allocate(damage, densities, 1.0) == [3, 3, 3]
    assert allocate(damage, densities, 0.0) == [0, 0, 0]


def test_a_schedule_is_followed_at_a_density():
    steps = levels(CONFIG, LENGTH)
    factors = [1.6, 1.0, 0.4]
    for wanted in (0.5, 0.65, 0.8):
        chosen = follow(factors, wanted, steps)
        assert sum(steps[level].density for level in chosen) <= wanted * 3
        # A level more in every layer is too much.
        assert sum(steps[min(level + 1, len(steps) - 1)].density for level in chosen) > wanted * 3
        # One scale for all, to a level.
        least = max(steps[level].scale / factor for level, factor in zip(chosen, factors, strict=True) if level)
        for level, factor in zip(chosen, factors, strict=True):
            assert level + 1 == len(steps) or least < steps[level + 1].scale / factor
        assert chosen == sorted(chosen, reverse=True)
        assert chosen[0] > chosen[2]
    assert follow([1.0], 0.0, steps) == [0]
    assert follow([1.0, 0.5], 1.0, steps) == [len(steps) - 1] * 2


def test_part_of_the_way_to_an_allocation():
    densities = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert toward([0, 4], 0.3, 1.0, densities) == [0, 4]
    assert toward([0, 4], 0.3, 0.5, densities) == [1, 3]
    assert toward([0, 4], 0.3, 0.0, densities) == [2, 2]
