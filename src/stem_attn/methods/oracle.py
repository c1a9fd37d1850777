"""The oracle: it computes dense attention to choose blocks by what they really contribute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid
from stem_attn.methods.base import Knob, Rival, check_block_size, check_number
from stem_attn.methods.estimates import attention_mass, attention_tiles, key_blocks
from stem_attn.methods.masks import best_share, forced_blocks

Measure = Literal["mass", "effect"]
Scope = Literal["head", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle(Rival):
    """Keep the blocks of largest true attention mass or true effect on the output, to an exact density.

    A reference, not a method: it costs more than dense attention.

    Args:
        block_size: Tokens a block.
        density: Kept over causal blocks, diagonal blocks included.
        measure: `"mass"`: a block's attention, averaged over the queries of the row. `"effect"`: how much the squared
            error of the row's output falls when the block joins those of more mass.
        scope: Which blocks compete for the total: those of a `"head"`, or of all heads, `"layer"`.
    """

    knob: ClassVar[Knob] = Knob("density", low=0, high=1, rising=True)

    block_size: int = 128
    density: float = 0.2
    measure: Measure = "mass"
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_number("density", self.density, 0, 1)
        for name, choices in (("measure", Measure), ("scope", Scope)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")

    def scores(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """Return the measure: float32 [B, Hq, Qb, Kb]."""
        return attention_mass(q, k, grid, scale) if self.measure == "mass" else _effect(q, k, v, grid, scale)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        return self.scores(q, k, v, grid, scale)

    def keep(self, estimate: Tensor, grid: BlockGrid, lengths: list[int]) -> Tensor:
        return best_share(estimate, grid, self.density, self.scope)


def _effect(q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    values = key_blocks(v, grid).float()
    heads = q.shape[1] // k.shape[1]
    shape = len(values), heads, grid.q_blocks, grid.k_blocks
    effect = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    for which, rows, tile in attention_tiles(q, k, grid, scale, width=v.shape[3]):
        probabilities, blocks = tile.float(), tile.shape[4]
        diagonal = forced_blocks(grid, 0, 1, q.device)[rows, :blocks]
        order = probabilities.sum((3, 5)).masked_fill_(diagonal, torch.inf).sort(dim=-1, descending=True).indices
        outputs = torch.einsum("nhrqks,nksd->nhrqkd", probabilities, values[which, :blocks])
        exact = outputs.sum(4, keepdim=True)
        # Softmax over the first blocks of the order: what they put out over their share of the attention.
        outputs = outputs.gather(4, order[:, :, :, None, :, None].expand_as(outputs)).cumsum(4)
        shares = probabilities.sum(5)
        shares = shares.gather(4, order[:, :, :, None].expand_as(shares)).cumsum(4).clamp_(min=1e-30)
        errors = outputs.div_(shares[..., None]).sub_(exact).square_().sum((3, 5))
        falls = F.pad(errors[..., :-1] - errors[..., 1:], (1, 0), value=torch.inf)
        # A block that makes larger falls possible is worth as much: none comes before one of more mass.
        falls = falls.flip(-1).cummax(-1).values.flip(-1)
        effect[which, :, rows, :blocks] = torch.empty_like(falls).scatter_(-1, order, falls)
    return effect.view(*q.shape[:2], grid.q_blocks, grid.k_blocks)
