"""`route` as one opaque operator, which is what torch.compile sees of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stem_attn.integrations.hf.properties import Properties
from stem_attn.integrations.hf.route import route
from stem_attn.integrations.hf.state import State
from stem_attn.traced import TAGS


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
    properties: Properties,
) -> Tensor:
    """Do what `route` does, within a graph: it is decided when the graph runs, not when it is traced."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    extras = properties.softcap, properties.sinks, type(module).__module__
    out: Tensor = _op(query, key, value, mask, scale, layer, dense_layer, state.key, *extras)
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


@torch.library.custom_op("stem_attn::hf_prefill", mutates_args=(), **TAGS)  # masks are read on the host, too
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    layer: int | None,
    dense_layer: bool,
    state_key: int,
    softcap: float | None,
    sinks: Tensor | None,
    defined_in: str,
) -> Tensor:
    # All that SDPA's wrapper and models' eager functions read of the module.
    group = query.shape[1] // key.shape[1]
    module = SimpleNamespace(
        num_key_value_groups=group, is_causal=True, training=False, sinks=sinks, layer_idx=layer, defined_in=defined_in
    )
    how: dict[str, Any] = {"scale": scale, "layer": layer, "dense_layer": dense_layer}
    return route(State.by_key(state_key), module, query, key, value, mask, **how, properties=Properties(softcap, sinks))


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
    softcap: float | None,
    sinks: Tensor | None,
    defined_in: str,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
