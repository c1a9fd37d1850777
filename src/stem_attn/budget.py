"""Token Position-Decay: how many key blocks each query block keeps.

A budget depends on positions, the prompt's length and the config only. So it is made on the host, for the whole
prompt, and a chunk reads its rows of it: a chunk boundary changes nothing. Results are kept, because every layer and
every chunk asks for the same: never write to them.

Layers may differ in the scale of their budgets, and a server's prompts have many lengths. So what the layers of a model
will ask for one after the other is made at once, as soon as the first of them asks for a length that is new.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig

KEPT = 8192
"""Budgets that are kept: of 128 lengths in a model of 64 layers."""
FAMILIES = 64
"""Configs that differ in more than their scale, of which it is remembered which scales have been asked for."""
LAYERS = 128
"""Scales that are made together at most, the latest to be asked for."""
CHUNKS = 64
"""Chunks of which something is remembered: a server's begin and end anywhere, but a step's layers ask for the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Budgets:
    """Budgets of the same prompts by configs that differ in `budget_scale` only.

    Args:
        configs: One a layer.
        blocks: int32 [L, n] on the CPU, from 1 to the prompt's n blocks, not yet clipped to a row's causal ones;
            [L, B, n] where batch rows differ, n being the longest prompt's.
    """

    configs: tuple[StemConfig, ...]
    blocks: Tensor
    _whole: dict[tuple[int, int], list[bool]] = field(init=False, repr=False, default_factory=dict)

    def keep_everything(self, grid: BlockGrid) -> list[bool]:
        """Tell of every layer whether each row of a call keeps all its causal blocks."""
        first, last = rows = grid.first_block, grid.k_blocks
        whole = self._whole.get(rows)
        if whole is None:
            prune = self.blocks[..., first:last] <= torch.arange(first, last, dtype=torch.int32, device="cpu")
            if len(self._whole) >= CHUNKS:
                self._whole.clear()
            whole = self._whole[rows] = (~prune.flatten(1).any(1)).tolist()
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """The blocks that every query row of a prompt may keep.

    Args:
        of_layers: Where it was made.
        layer: Which of them it is.
        blocks: int32 [n] or [B, n], its own.
    """

    of_layers: Budgets
    layer: int
    blocks: Tensor

    @property
    def config(self) -> StemConfig:
        """The schedule."""
        return self.of_layers.configs[self.layer]

    def rows(self, grid: BlockGrid) -> Tensor:
        """Return the budget of the rows that a call holds: int32 [Qb], or [B, Qb]."""
        return self.blocks[..., grid.first_block : grid.k_blocks]

    def keeps_everything(self, grid: BlockGrid) -> bool:
        """Tell whether every row of a call keeps all its causal blocks, so that there is nothing to score."""
        return self.of_layers.keep_everything(grid)[self.layer]


_kept: dict[tuple[StemConfig, tuple[int, ...]], Budget] = {}
_asked: dict[StemConfig, dict[StemConfig, None]] = {}  # by what they share, configs that have asked for a budget
_lock = Lock()


def budget_of(config: StemConfig, prompt_lens: tuple[int, ...]) -> Budget:
    """Return the budget of a prompt, or of a batch of prompts.

    Args:
        config: The schedule.
        prompt_lens: Tokens of the whole prompt: one int for all batch rows, or one a row.

    Source: Stem, Eq. 3 (`decay_from="first_row"`); the authors' code (`decay_from="plateau"`).
    """
    key = config, tuple(-(-n // config.block_size) for n in prompt_lens)
    budget = _kept.get(key)
    return _make(*key) if budget is None else budget


def budgets_of_layers(config: StemConfig, prompt_lens: tuple[int, ...]) -> list[Budgets]:
    """Return the budgets of all configs alike that have asked for any so far, as they were made; see `budget_of`."""
    alike = [*_asked.get(_unscaled(config), {}), config]
    return list({id(made): made for made in (budget_of(one, prompt_lens).of_layers for one in alike)}.values())


def _make(config: StemConfig, prompt_blocks: tuple[int, ...]) -> Budget:
    """Make the budgets of some prompts for a config, and for those like it that have asked for budgets before."""
    with _lock:
        budget = _kept.get((config, prompt_blocks))
        if budget is not None:  # another thread has made it in the meantime
            return budget
        family = _unscaled(config)
        alike = {one: None for one in _asked.get(family, {}) if one != config} | {config: None}
        if len(alike) > LAYERS:
            del alike[next(iter(alike))]
        configs = tuple(one for one in alike if (one, prompt_blocks) not in _kept)
        made = Budgets(configs, _blocks(configs, prompt_blocks))
        _asked[family] = alike  # not before: what cannot be made must not come back with every new length
        if len(_asked) > FAMILIES:
            del _asked[next(iter(_asked))]
        for layer, (one, blocks) in enumerate(zip(configs, made.blocks.unbind(0), strict=True)):
            _kept[one, prompt_blocks] = Budget(made, layer, blocks)
        budget = _kept[config, prompt_blocks]
        while len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
        return budget


@lru_cache(maxsize=1024)
def _unscaled(config: StemConfig) -> StemConfig:
    return dataclasses.replace(config, budget_scale=1.0)


def _blocks(configs: tuple[StemConfig, ...], prompt_blocks: tuple[int, ...]) -> Tensor:
    """Return the budgets of some prompts by configs that differ in their scale: int32 [L, n] or [L, B, n]."""
    rows = [_prompt_budget(configs, n) for n in prompt_blocks]
    if len(rows) == 1:
        return rows[0]
    table = torch.zeros(len(configs), len(rows), max(prompt_blocks), dtype=torch.int32, device="cpu")
    for n, row in enumerate(rows):
        table[:, n, : row.shape[1]] = row
    return table


def _prompt_budget(configs: tuple[StemConfig, ...], n: int) -> Tensor:
    """Return the budgets of all n rows of a prompt: int32 [L, n]."""
    shared = configs[0]
    if n < shared.dense_below:
        return torch.full((len(configs), n), n, dtype=torch.int32, device="cpu")
    rows = torch.empty(len(configs), n, dtype=torch.int32, device="cpu")
    for row, config in zip(rows.unbind(0), configs, strict=True):
        start = config.full_budget(n)
        if config.decay_from == "first_row":
            places = torch.arange(n, dtype=torch.float64, device="cpu")
            budget = start - start * (1 - config.decay) / n * places
            row.copy_(budget.floor_().clamp_(max=n))  # before it is cut to 32 bits
        else:
            plateau = min(max(int(start), config.budget_floor), n)
            row[:plateau] = plateau
            end = config.decay * plateau
            row[plateau:] = torch.linspace(plateau, end, n - plateau, dtype=torch.float64, device="cpu").floor_()
    rows.clamp_(min=min(shared.budget_floor, n), max=n)
    first = max(n - shared.tail_blocks, 0)
    if first < n:
        tail = torch.arange(first + 1, n + 1, dtype=torch.float64, device="cpu").mul_(shared.tail_ratio).ceil_()
        rows[:, first:] = rows[:, first:].maximum(tail.to(torch.int32))
    return rows
