"""Whether a sparse prefill is faster than a dense one: told by lengths and the density that the budget bounds."""

from __future__ import annotations

from functools import lru_cache

from stem_attn.blocks import BlockGrid
from stem_attn.budget import block_budget, keeps_everything
from stem_attn.config import StemConfig
from stem_attn.selection import most_kept

# (tokens below which a step applies, density up to which sparse is faster).
# H100, bfloat16, head dim 128 (benchmarks/results/h100-short-half, docs/log.md), whole calls in ms at density d against
# cuDNN: 4096 tokens 0.043 + 0.253 d against 0.258, so 0.85; 8192 tokens 0.066 + 0.85 d against 0.899, so 0.98, less
# some margin. Shorter calls take the host longer than the device.
_CUDA = ((4096, 0.0), (8192, 0.85), (None, 0.95))
# Mass scores and shared budgets (benchmarks/results/h100-llama3-8b-default): 8192 tokens 0.107 + 0.95 d against 0.885,
# so 0.82; 16384 tokens 0.196 + 3.47 d against 3.30, so 0.89; less a margin. At 4096 two more launches take the host
# longer.
_CUDA_MASS = ((8192, 0.0), (16384, 0.7), (None, 0.85))
# CPU, float32, 8192 tokens (docs/log.md): attention is 2.2 times as fast as SDPA at density 0.26, so d costs 1.75 d,
# and the selection a tenth of it.
_ELSEWHERE = ((None, 0.5),)


@lru_cache(maxsize=256)
def sparse_is_faster(
    device_type: str,
    config: StemConfig,
    calls: tuple[tuple[int, BlockGrid], ...],
    told_lens: tuple[int, ...] | None,
) -> bool:
    """Tell whether sparse attention is faster than dense. Cached, because every layer asks the same.

    Args:
        device_type: `torch.device.type`.
        config: The method.
        calls: Of every batch row with queries: tokens of the whole prompt as far as known, and the blocks.
        told_lens: Tokens of every batch row's whole prompt, where told. The whole prompt then decides, so that all its
            chunks are decided alike and chunks give what one pass gives.
    """
    if calls and all(keeps_everything(config, n, grid) for n, grid in calls):
        return False  # dense gives the same
    prompts = calls if told_lens is None else tuple((n, BlockGrid(n, n, config.block_size)) for n in told_lens)
    kept = sum(int(most_kept(block_budget(config, n, grid), grid, config).sum()) for n, grid in prompts)
    tokens = max((grid.k_len for _, grid in prompts), default=0)
    plain = config.score == "linear" and config.budget_scope == "head"
    steps = _ELSEWHERE if device_type != "cuda" else _CUDA if plain else _CUDA_MASS
    limit = next(density for below, density in steps if below is None or tokens < below)
    return kept <= limit * sum(grid.causal_blocks for _, grid in prompts)
