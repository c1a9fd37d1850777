"""`route` as one opaque operator, which is what torch.compile sees of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stem_attn.integrations.hf.route import route
from stem_attn.integrations.hf.state import State


def route_op(
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
) -> Tensor:
    """Do what `route` does, within a graph: it is decided when the graph runs, not when it is traced."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = _op(query, key, value, mask, scale, layer, dense_layer, state.key)
    return out


def refuse_export() -> None:
    """Raise if torch.export or torch.jit.trace is at work.

    Raises:
        ValueError: It is.
    """
    # Not torch.compiler.is_exporting(): within dynamo torch before 2.14 takes that for a constant.
    if getattr(torch.compiler, "_is_exporting_flag", False) or torch._C._get_tracing_state():
        raise ValueError(
            "a model with stem attention cannot be exported: the graph would refer to settings that live in this "
            "process only; call hf.disable(model) first"
        )


# It reads masks on the host, which a CUDA graph must not record; older torch has no such tag.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("stem_attn::hf_prefill", mutates_args=(), **_TAGS)
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    layer: int | None,
    dense_layer: bool,
    state_key: int,
) -> Tensor:
    # All that SDPA's wrapper reads of the module.
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    state = State.by_key(state_key)
    return route(state, module, query, key, value, mask, scale=scale, layer=layer, dense_layer=dense_layer)


@_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    layer: int | None,
    dense_layer: bool,
    state_key: int,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
