"""One call that may be sparse: decide between sparse, banded and dense, and attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from stem_attn import backends
from stem_attn.api import block_sparse_attention
from stem_attn.backends.base import Geometry
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.integrations.hf.counters import MISSED
from stem_attn.integrations.hf.dense import attend_densely, check_keys
from stem_attn.integrations.hf.masks import Layout, layout
from stem_attn.integrations.hf.properties import Properties
from stem_attn.integrations.hf.sparse import SparseCall
from stem_attn.integrations.hf.state import State

Attend = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]
"""Called with q, k, v of batch rows that are padded alike, and their prompts' lengths; returns [B, Hq, Tq, Dv]."""


def route(
    state: State,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    layer: int | None,
    dense_layer: bool,
    properties: Properties,
) -> Tensor:
    """Attend causally, over the selected blocks where that pays.

    Where it does not pay, SDPA runs, or with a softcap or sinks our kernels over all blocks: the model's own eager
    function would need memory quadratic in the prompt. That runs where a call is short, a decode step, or padded
    between tokens.

    Args:
        state: The model's settings and counters.
        module: The attention module, for the dense fallback.
        query: [B, Hq, L, D], L > 1.
        key: [B, Hkv, n, D]; places of tokens not yet seen are ignored.
        value: [B, Hkv, n, Dv].
        mask: None (the queries are the first tokens), or a compact mask.
        scale: Factor of the logits, or None for 1 / sqrt(D).
        layer: The layer's index in the model, for its budget.
        dense_layer: Whether the layer is one of `policy.dense_layers`.
        properties: The layer's softcap and sinks.

    Returns:
        [B, L, Hq, Dv]; zeros at padded queries of sparse and banded calls.

    Raises:
        ValueError: The prompt is longer by a block than what `prompt_len` says, or that is for another batch size; or
            the cache holds other keys than those that the mask is for.
    """
    batch, _, q_len, _ = query.shape
    check_keys(module, query, key, mask)
    tokens = layout(mask, batch, q_len)
    seen, keys = tokens.seen, tokens.present
    told_lens = state.prompt_lens(batch, layer, fresh=seen == q_len)
    if mask is None and told_lens is None and q_len < state.policy.min_seq_len:
        # Nothing else can matter, and in short prompts the host's time shows.
        return _dense(state, module, query, key, value, mask, scale, properties, "short prompt")
    config = state.config if layer is None else state.policy.layer_config(state.config, layer, state.layers)
    reason = _why_dense(state, tokens, told_lens, q_len)
    rows = tokens.rows or ()
    real = [end - first for first, end in rows]
    if told_lens is not None and rows:  # drafted tokens may follow a prompt
        told_lens = [max(n, told) for n, told in zip(real, told_lens, strict=True)]
    lens = told_lens or real
    window = tokens.window if tokens.window is not None and tokens.window < max(lens, default=0) else None
    whole = None  # why all blocks are kept
    if reason is None and dense_layer and window is None:  # a band is exact, so it may stand for dense
        whole = "dense layer"
    elif reason is None and window is None and state.policy.crossover and state.method is None:
        calls = _calls(state, rows, lens, q_len, keys, seen)
        device_type = query.device.type
        geometry = Geometry(device_type, query.dtype, max(query.shape[3], value.shape[3]), seen)
        backend = backends.expected(state.backend, device_type)
        whole = state.policy.why_dense(config, calls, told_lens, backend, geometry)
    if reason is not None or (whole is not None and not properties.any):
        return _dense(state, module, query, key, value, mask, scale, properties, reason or whole or "")

    how: dict[str, Any] = {"scale": scale, "softcap": properties.softcap, "sinks": properties.sinks}
    sparse = SparseCall(state, config, how)

    def all_blocks(q: Tensor, k: Tensor, v: Tensor, lens: list[int]) -> Tensor:
        return _all_blocks(state, q, k, v, how)

    def banded(q: Tensor, k: Tensor, v: Tensor, lens: list[int]) -> Tensor:
        assert window is not None
        return _banded(state, q, k, v, window, how)

    parts = list(_parts(rows, lens, seen, q_len, keys))

    def run(attend: Attend) -> Tensor:
        return _without_padding(attend, query, key, value, parts)

    if whole is not None:
        state.counters.dense(whole, batch * q_len)
        return run(all_blocks)
    if window is not None:
        state.counters.banded(batch * q_len)
        return run(banded)
    out = run(sparse.attend)
    missed = sparse.misses(layer)
    if missed is True:
        state.counters.redone(layer)
        if not properties.any:
            return _dense(state, module, query, key, value, mask, scale, properties, MISSED)
        state.counters.dense(MISSED, batch * q_len)
        return run(all_blocks)
    if missed is not False:
        for which, queries, present, _ in parts:
            q, k, v = query[which, :, queries], key[which, :, present], value[which, :, present]
            sparse.attend_if(missed, q, k, v, out[which, queries].transpose(1, 2))
    unknown = told_lens is None and seen > q_len
    state.counters.sparse(batch * q_len, sparse.kept, unknown_prompt_len=unknown, layer=layer, missed=missed)
    return out


_Part = tuple[slice, slice, slice, list[int]]
"""Batch rows that are padded alike, their real tokens among queries and among keys, and their prompts' lengths."""


def _parts(rows: tuple[tuple[int, int], ...], lens: list[int], seen: int, q_len: int, k_len: int) -> Iterator[_Part]:
    """Yield the parts of a call that have queries."""
    alike = len(set(rows)) == 1
    spans = [(slice(None), rows[0])] if alike else [(slice(b, b + 1), row) for b, row in enumerate(rows)]
    for which, (first, end) in spans:
        queries = _present(first, end, seen, q_len)
        if queries.start < queries.stop:
            yield which, queries, _present(first, end, seen, k_len), lens[which]


def _without_padding(attend: Attend, query: Tensor, key: Tensor, value: Tensor, parts: list[_Part]) -> Tensor:
    """Attend to all parts, each cut to its real tokens: [B, L, Hq, Dv], zeros elsewhere."""
    batch, heads, q_len, _ = query.shape

    def attended(part: _Part) -> Tensor:
        which, queries, present, lens = part
        return attend(query[which, :, queries], key[which, :, present], value[which, :, present], lens).transpose(1, 2)

    if [part[:2] for part in parts] == [(slice(None), slice(0, q_len))]:  # nothing is padded
        return attended(parts[0]).contiguous()
    out = query.new_zeros(batch, q_len, heads, value.shape[3])
    for part in parts:
        out[part[0], part[1]] = attended(part)
    return out


def _dense(
    state: State,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    properties: Properties,
    reason: str,
) -> Tensor:
    state.counters.dense(reason, query.shape[0] * query.shape[2])
    # Sinks are the module's own to its eager function.
    cap = {} if properties.softcap is None else {"softcap": properties.softcap}
    out, _ = attend_densely(module, query, key, value, mask, eager=properties.any, scaling=scale, **cap)
    return out


def _calls(
    state: State, rows: tuple[tuple[int, int], ...], lens: list[int], q_len: int, keys: int, seen: int
) -> tuple[tuple[int, BlockGrid], ...]:
    """Return the whole prompt's tokens, as far as known, and the blocks of every batch row that has queries.

    Where all rows are alike, one stands for all.
    """
    pairs = list(zip(rows, lens, strict=True))
    calls = []
    for (first, end), n in pairs if len(set(pairs)) > 1 else pairs[:1]:
        queries, present = _present(first, end, seen, q_len), _present(first, end, seen, keys)
        if queries.start < queries.stop:
            grid = BlockGrid(queries.stop - queries.start, present.stop - present.start, state.block_size)
            calls.append((n, grid))
    return tuple(calls)


def _present(first: int, end: int, seen: int, last: int) -> slice:
    """Return where the tokens first..end are among the last `last` of all seen."""
    return slice(max(first - seen + last, 0), end - seen + last)


def _why_dense(state: State, tokens: Layout, told_lens: list[int] | None, q_len: int) -> str | None:
    """Say why this call is not for sparse or banded attention, or return None."""
    few = tokens.seen > q_len and q_len < state.block_size  # a prompt's last short chunk, or a decode step of several
    if tokens.rows is None:
        return "decode" if few else "padding between tokens"
    real = [end - first for first, end in tokens.rows]
    if told_lens is None:
        if few:
            return "decode"
    else:
        beyond = max(n - told for n, told in zip(real, told_lens, strict=True))
        if few and beyond > 0:
            return "decode"
        if beyond >= state.block_size:  # fewer may be drafted ones, which assisted decoding checks beside the prompt
            raise ValueError(f"prompt_len says {told_lens} tokens, but the prompt already has {real}")
    return "short prompt" if max(told_lens or real) < state.policy.min_seq_len else None


def _all_blocks(state: State, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
    grid = BlockGrid(q.shape[2], k.shape[2], state.block_size)
    everything = BlockSelection.everything(batch=q.shape[0], heads=q.shape[1], grid=grid, device=q.device)
    out: Tensor = block_sparse_attention(q, k, v, everything, backend=state.backend, **how)
    return out


def _banded(state: State, q: Tensor, k: Tensor, v: Tensor, window: int, how: dict[str, Any]) -> Tensor:
    band = BlockSelection.band(
        batch=q.shape[0],
        heads=q.shape[1],
        window=window,
        block_size=state.block_size,
        q_len=q.shape[2],
        k_len=k.shape[2],
        device=q.device,
    )
    out: Tensor = block_sparse_attention(q, k, v, band, window=window, backend=state.backend, **how)
    return out
