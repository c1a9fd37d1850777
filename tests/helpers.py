"""What several test files share."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stem_attn import BlockSelection, StemConfig
from stem_attn.blocks import BlockGrid
from stem_attn.scoring import block_scores

VECTORS = sorted((Path(__file__).parent / "vectors").glob("*.safetensors"))

# Keeps about a fifth of the blocks at a few hundred tokens.
SMALL = StemConfig(
    block_size=16,
    score="linear",
    budget_ratio=0.15,
    budget_bias=2,
    decay=0.7,
    tail_blocks=0,
    budget_scope="head",
)


def installed(there: bool, what: str) -> None:
    """Skip where something that `make` installs is missing; CI installs it, so there that is an error."""
    if not there:
        assert not os.environ.get("CI"), f"{what} is missing"
        pytest.skip(f"{what} is not installed: `make test` installs it")


def make_qkv(
    q_len: int,
    k_len: int | None = None,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    k_len = k_len or q_len

    def draw(h: int, t: int, d: int) -> Tensor:
        return torch.randn(batch, h, t, d, generator=gen).to(dtype)

    return draw(heads, q_len, dim), draw(kv_heads, k_len, dim), draw(kv_heads, k_len, v_dim or dim)


def load_vector(path: Path) -> tuple[StemConfig, dict[str, Tensor]]:
    """Read what the authors' code made of some inputs: its settings, and all its tensors by name."""
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    config = StemConfig.preset(
        "official",
        block_size=int(meta["block_size"]),
        stride=int(meta["stride"]),
        decay=float(meta["alpha"]),
        sink_blocks=int(meta["initial_blocks"]),
        local_blocks=int(meta["window_size"]),
    )
    return config, tensors


def assert_same_blocks(selection: BlockSelection, expected: Tensor, scores: Tensor, rounding: float) -> None:
    """Kept blocks are `expected`, except that blocks whose scores nearly tie with the cutoff may change places.

    `scores` are exact; `rounding` is how far the selection's own scores may be from them. A block may differ only if
    its score is within 4 roundings of the lowest kept one (the cutoff) among the blocks that expected keeps freely.
    """
    mask = selection.to_mask()
    assert mask.shape == expected.shape
    assert torch.equal(mask.sum(-1), expected.sum(-1))
    for row in (mask != expected).any(-1).nonzero().tolist():
        kept, wanted, score = mask[tuple(row)], expected[tuple(row)], scores[tuple(row)]
        swapped = score[kept != wanted]
        assert swapped.max() - swapped.min() <= 4 * rounding, (row, swapped)


def score_rounding(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, exact: Tensor, scale: float) -> float:
    """Largest error of the fast path's scores."""
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    causal = torch.arange(grid.k_blocks) <= grid.block_ids()[:, None]
    return float((block_scores(q, k, v, config, scale) - exact)[..., causal].abs().max())
