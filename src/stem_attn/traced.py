"""The one opaque operator that torch.compile sees: a call by its tensors and plain values.

What it computes is decided when the graph runs, not when it is traced. Outside of tracing nothing comes through here,
so that an eager call pays for no dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stem_attn import run
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.call import Call
from stem_attn.checks import check_qkv, resolve_scale
from stem_attn.config import Precision, Residual, StemConfig
from stem_attn.layout import Layout


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig | None = None,
    selection: BlockSelection | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seq_lens: Any = None,
    block_table: Tensor | None = None,
    prompt_len: Any = None,
    backend: str,
    wanted: str,
    scale: float | None,
    **properties: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the operator into the graph that is being traced.

    Args:
        q: As the public function takes it; so are k, v, the sequences' starts and lengths, and the block table.
        k: Likewise.
        v: Likewise.
        config: Stem's settings, or None where `selection` is given.
        selection: Blocks that were chosen before.
        cu_seqlens_q: Given where sequences are packed or paged.
        cu_seqlens_k: Given where they are packed and have prefixes.
        seq_lens: Given where they are paged.
        block_table: Given where they are paged.
        prompt_len: Tokens of the whole prompts.
        backend: `"auto"` or a backend's name.
        wanted: Which of `out`, `lse` and `selection` are computed, by their names; the others come back empty.
        scale: Factor of the logits, or None.
        properties: Other fields of `Call`.

    Returns:
        The output as the public function returns it, the log-sum-exp, and the kept blocks' indices and counts. The
        indices have a slot for every key block, so that their shape follows from the inputs' shapes.
    """
    if cu_seqlens_q is None:
        check_qkv(q, k, v)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _op(
        q,
        k,
        v,
        None if selection is None else selection.indices,
        None if selection is None else selection.counts,
        *(_as_tensor(x) for x in (cu_seqlens_q, cu_seqlens_k, seq_lens, prompt_len)),
        block_table,
        "" if config is None else config.to_json(),
        config.block_size if selection is None else selection.block_size,  # type: ignore[union-attr]
        backend,
        wanted,
        resolve_scale(scale, q.shape[-1]),
        **properties,
    )
    return result


def _as_tensor(value: Any) -> Tensor | None:
    """Turn ints into a tensor: they may be symbols, which an operator takes in this form only."""
    if value is None or isinstance(value, Tensor):
        return value
    ints = list(value) if isinstance(value, Sequence) else [value]
    return torch.tensor(ints, dtype=torch.int64, device="cpu")


# What these operators launch follows from lengths that the host reads at every call, and what the first call copies to
# the device stays there: a CUDA graph must record neither. Older torch has no such tag.
TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("stem_attn::prefill", mutates_args=(), **TAGS)
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_lens: Tensor | None,
    prompt_len: Tensor | None,
    block_table: Tensor | None,
    config: str,
    block_size: int,
    backend: str,
    wanted: str,
    scale: float,
    window: int | None = None,
    residual: str = "none",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prompts = None if prompt_len is None else prompt_len.tolist()
    if prompts is not None and len(prompts) == 1:
        prompts = prompts[0]
    if cu_seqlens_q is None:
        layout = Layout.dense(q, k, v, prompts)
    elif block_table is None:
        layout = Layout.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, prompts)
    else:
        layout = Layout.paged(q, k, v, cu_seqlens_q, seq_lens, block_table, prompts)
    choices = cast(Residual, residual), softcap, sinks, cast(Precision, precision)
    call = Call(layout, block_size, scale, window, *choices)
    nothing = q.new_empty(0, dtype=torch.float32)
    ints = q.new_empty(0, dtype=torch.int32)
    if indices is not None and counts is not None:
        chosen = [BlockSelection.made(indices, counts, BlockGrid(q.shape[2], k.shape[2], block_size))]
        out, lse = run.attend(call, chosen, backend, return_lse="lse" in wanted)
        return out, nothing if lse is None else lse, ints, ints.clone()
    if "out" in wanted:
        out, chosen = run.prefill(call, StemConfig.from_json(config), backend)
    else:
        out, chosen = nothing, run.select(call, StemConfig.from_json(config), backend)
    out = out if cu_seqlens_q is None else out[0].transpose(0, 1)
    if "selection" not in wanted:
        return out, nothing.clone(), ints, ints.clone()
    found = chosen[0]
    wide = torch.nn.functional.pad(found.indices, (0, found.grid.k_blocks - found.indices.shape[3]), value=-1)
    # Not views: an operator's outputs share no memory.
    return out, nothing.clone(), wide.clone(), found.counts.clone()


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_lens: Tensor | None,
    prompt_len: Tensor | None,
    block_table: Tensor | None,
    config: str,
    block_size: int,
    backend: str,
    wanted: str,
    scale: float,
    window: int | None = None,
    residual: str = "none",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens_q is None:  # tokens come before heads in memory, as in `Call.new_output`
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    else:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:3] if "lse" in wanted else (0,), dtype=torch.float32)
    if "selection" not in wanted:
        rows: tuple[Any, ...] = (0,)
        width: tuple[Any, ...] = ()
    else:
        grid = BlockGrid(q.shape[2], k.shape[2], block_size)
        rows, width = (*q.shape[:2], grid.q_blocks), (grid.k_blocks,)
    return (
        out if "out" in wanted else q.new_empty(0, dtype=torch.float32),
        lse,
        q.new_empty((*rows, *width), dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
    )
