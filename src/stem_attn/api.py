"""Stem as one call: validate, score, budget, select, attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from stem_attn import backends
from stem_attn.attention import block_sparse_attention
from stem_attn.backends.base import empty_output
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import block_budget, keeps_everything
from stem_attn.checks import check_config, check_qkv, resolve_prompt_len, resolve_scale
from stem_attn.config import StemConfig

_DEFAULT = StemConfig()


@overload
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig = _DEFAULT,
    scale: float | None = None,
    prompt_len: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
    return_selection: Literal[False] = False,
) -> Tensor: ...


@overload
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig = _DEFAULT,
    scale: float | None = None,
    prompt_len: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
    return_selection: Literal[True],
) -> tuple[Tensor, BlockSelection]: ...


def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig = _DEFAULT,
    scale: float | None = None,
    prompt_len: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, BlockSelection]:
    """Compute causal attention of a prefill over the key blocks that Stem selects.

    It does what the config says at any length. Whether sparse is worth it (short prompts, decode) is the adapters'
    decision.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens; query i sees keys `j <= i + Tk - Tq`.
        k: [B, Hkv, Tk, D]; Hkv divides Hq and is not repeated.
        v: [B, Hkv, Tk, Dv].
        config: The method; see `StemConfig`.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        prompt_len: Tokens of the whole prompt, prefix and coming chunks included: one int or one a batch row. The
            budget is computed from it. Default: Tk.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
        return_selection: Whether to return the kept blocks too.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with `return_selection` also the `BlockSelection`.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.

    Source: Stem (arXiv 2603.06274).
    """
    if torch.compiler.is_compiling() and not return_selection:
        check_qkv(q, k, v)
        check_config(config)
        lengths = resolve_prompt_len(prompt_len, q.shape[0], k.shape[2])
        traced: Tensor = _op(q, k, v, config.to_json(), resolve_scale(scale, q.shape[3]), lengths, backend)
        return traced
    selection = select_blocks(q, k, v, config=config, scale=scale, prompt_len=prompt_len, backend=backend)
    out = block_sparse_attention(q, k, v, selection, scale=scale, residual=config.residual, backend=backend)
    return (out, selection) if return_selection else out


def select_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig,
    scale: float | None = None,
    prompt_len: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> BlockSelection:
    """Choose the key blocks that every query block keeps.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D]; Hkv divides Hq.
        v: [B, Hkv, Tk, Dv]; only magnitudes are read.
        config: The method; see `StemConfig`.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        prompt_len: Tokens of the whole prompt: one int or one a batch row, at least Tk. Default: Tk.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        The selection. Equal scores go to the lower index.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.

    Source: Stem, Eq. 3 (how many blocks) and Eq. 7 (which).
    """
    check_qkv(q, k, v)
    check_config(config)
    scale = resolve_scale(scale, q.shape[3])
    lengths = resolve_prompt_len(prompt_len, q.shape[0], k.shape[2])
    chosen = backends.choose(backend, q, k, v, block_size=config.block_size, select=True)
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    if all(keeps_everything(config, n, grid) for n in lengths):
        return keep_everything(q, grid)
    budgets = [block_budget(config, n, grid) for n in lengths]
    budget = budgets[0] if len(set(lengths)) == 1 else torch.stack(budgets)
    return chosen.select(q, k, v, config=config, scale=scale, budget=budget)


def keep_everything(q: Tensor, grid: BlockGrid) -> BlockSelection:
    """Return the selection of all causal blocks for q, [B, Hq, Tq, D]."""
    return BlockSelection.band(
        batch=q.shape[0],
        heads=q.shape[1],
        window=grid.k_len,
        block_size=grid.block_size,
        q_len=grid.q_len,
        k_len=grid.k_len,
        device=q.device,
    )


@torch.library.custom_op("stem_attn::stem_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: Sequence[int], backend: str) -> Tensor:
    """The opaque form that torch.compile sees; the config travels as JSON."""
    fields = StemConfig.from_json(config)
    return stem_attention(q, k, v, config=fields, scale=scale, prompt_len=list(prompt_len), backend=backend)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: Sequence[int], backend: str) -> Tensor:
    return empty_output(q, v)
