"""What a choice of blocks does to the attention of one layer, on the q, k, v of a dense forward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attn.api import block_sparse_attention
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.checks import resolve_scale
from stem_attn.lab.equal_density import Choice, mix, share_above
from stem_attn.methods.estimates import attention_mass

POSITION_BINS = 8
_DENSE_BLOCK = 128


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """The numbers of one choice on one layer; by position means by eighth of the prompt.

    Args:
        density: Kept over causal blocks.
        error: Frobenius |O_s - O| / |O| over all heads and positions, before the output projection.
        recall: Share of the attention probability that falls on kept blocks, mean over heads and queries.
        error_by_position: The error within each eighth.
        recall_by_position: The recall within each eighth.
    """

    density: float
    error: float
    recall: float
    error_by_position: list[float]
    recall_by_position: list[float]


class DenseLayer:
    """The q, k, v of one layer, and exact attention on them.

    Args:
        q: [1, Hq, T, D].
        k: [1, Hkv, T, D].
        v: [1, Hkv, T, Dv].
        scale: Factor of the logits, or None for 1 / sqrt(D).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        self.q, self.k, self.v = q, k, v
        self.scale = resolve_scale(scale, q.shape[3])
        everything = BlockSelection.band(
            batch=1,
            heads=q.shape[1],
            window=k.shape[2],
            block_size=_DENSE_BLOCK,
            q_len=q.shape[2],
            k_len=k.shape[2],
            device=q.device,
        )
        self.out = block_sparse_attention(q, k, v, everything, scale=self.scale)
        self._power = _by_token(self.out)
        self._mass: dict[int, Tensor] = {}

    def measure(self, choice: Choice) -> LayerNumbers:
        """Compare a choice with exact attention."""
        out = choice.attend(self.q, self.k, self.v, self.scale)
        lost = _by_token(out.float() - self.out.float())
        kept = self._kept_mass(choice.selection)
        return LayerNumbers(
            density=choice.selection.density(),
            error=_ratio(lost, self._power),
            recall=float(kept.mean()),
            error_by_position=list(map(_ratio, _eighths(lost), _eighths(self._power))),
            recall_by_position=[float(part.mean()) for part in _eighths(kept)],
        )

    def _kept_mass(self, selection: BlockSelection) -> Tensor:
        """Return the attention probability on kept blocks, mean over the heads: float64 [Qb] on the CPU."""
        size = selection.block_size
        if size not in self._mass:
            grid = BlockGrid(self.q.shape[2], self.k.shape[2], size)
            self._mass[size] = attention_mass(self.q, self.k, grid, self.scale)
        return (self._mass[size] * selection.to_mask()).sum(-1, dtype=torch.float64).mean((0, 1)).cpu()


def at_density(found: list[LayerNumbers], density: float | None) -> LayerNumbers:
    """Interpolate the numbers of two choices whose densities enclose a density; of one, return its own."""
    if len(found) == 1 or density is None:
        return found[0]
    below, above = found
    weight = share_above(below.density, above.density, density)
    names = [field.name for field in dataclasses.fields(LayerNumbers)]
    return LayerNumbers(**{name: mix(getattr(below, name), getattr(above, name), weight) for name in names})


def _by_token(x: Tensor) -> Tensor:
    """Sum the squares of [1, H, T, D] over heads and dims: float64 [T] on the CPU."""
    return x.float().square().sum(-1).sum((0, 1), dtype=torch.float64).cpu()


def _eighths(x: Tensor) -> tuple[Tensor, ...]:
    return x.tensor_split(POSITION_BINS)


def _ratio(lost: Tensor, power: Tensor) -> float:
    total = float(power.sum())
    return (float(lost.sum()) / total) ** 0.5 if total else 0.0
