"""The attention function that transformers calls, once per layer and forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stem_attn.config import StemConfig
from stem_attn.integrations.hf.autocast import autocast_off, cast_like_sdpa
from stem_attn.integrations.hf.compiled import refuse_export, route_op
from stem_attn.integrations.hf.counters import Counters
from stem_attn.integrations.hf.dense import attend_densely, is_causal
from stem_attn.integrations.hf.masks import is_compact
from stem_attn.integrations.hf.properties import NEED_EAGER, properties_of
from stem_attn.integrations.hf.route import route
from stem_attn.integrations.hf.state import ATTRIBUTE, State
from stem_attn.policy import PrefillPolicy

# Calls of modules that nobody has enabled: of a model made from the config of an enabled one, of layers added to it.
_strays = Counters()
_bare: State | None = None


def run_bare_name() -> None:
    """Let modules that nobody has enabled run the default config from now on; until then they are dense."""
    global _bare
    _bare = _bare or State(StemConfig(), PrefillPolicy())


# Arguments that change what attention computes, with the reason for dense.
_SPECIAL = {
    "position_bias": "position bias",
    "indices": "token indices",
    "block_indices": "token indices",
    "cu_seq_lens_q": "packed sequences",
}


def stem_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend sparsely, within a band or densely.

    Args:
        module: The attention module.
        query: [B, Hq, L, D].
        key: [B, Hkv, n, D], not repeated.
        value: [B, Hkv, n, Dv].
        attention_mask: What `masks.stem_mask` returned: None, compact or 4-D.
        dropout: Probability; above 0 in training only.
        scaling: Factor of the logits, or None for 1 / sqrt(D).
        kwargs: What else the model passes.

    Returns:
        ([B, L, Hq, Dv], attention weights where the model's eager function ran, otherwise None).
    """
    refuse_export()
    state: State | None = getattr(module, ATTRIBUTE, _bare)
    reason = why_dense(module, query, key, value, attention_mask, dropout, kwargs)
    if state is None or reason is not None:
        if not torch.compiler.is_compiling():
            counters = _strays if state is None else state.counters
            counters.dense(reason or "not enabled", query.shape[0] * query.shape[2])
        eager = any(kwargs.get(name) is not None for name in NEED_EAGER)
        if state is not None and _wants_weights(module, kwargs):  # only eager attention has any
            eager = eager or state.implementation_before(module.config) == "eager"
        return attend_densely(
            module, query, key, value, attention_mask, eager=eager, dropout=dropout, scaling=scaling, **kwargs
        )
    layer = getattr(module, "layer_idx", None)
    dense_layer = _is_dense_layer(layer, module, state.policy)
    run = route_op if torch.compiler.is_compiling() else route
    properties, _ = properties_of(query, kwargs)
    how: dict[str, Any] = {"scale": scaling, "layer": layer, "dense_layer": dense_layer, "properties": properties}
    query, key, value = cast_like_sdpa(query, key, value)
    with autocast_off(query.device.type):
        out = run(state, module, query, key, value, attention_mask, **how)
    return out, None


def why_dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Say why the form of a call rules out sparse attention, or return None."""
    properties, unknown = properties_of(query, kwargs)
    if unknown is not None:
        return unknown
    for name, reason in _SPECIAL.items():
        if kwargs.get(name) is not None:
            return reason
    if not is_causal(module, kwargs):
        return "not causal"
    if module.training or dropout:
        return "training"
    inputs = (query, key, value, properties.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "gradients (use torch.no_grad())"
    if _wants_weights(module, kwargs):
        return "output_attentions"
    if query.shape[2] == 1:
        return "decode"
    if mask is not None and not is_compact(mask):
        return "4-D mask"
    return None


def _wants_weights(module: Any, kwargs: dict[str, Any]) -> bool:
    told = kwargs.get("output_attentions")
    return bool(getattr(getattr(module, "config", None), "output_attentions", False) if told is None else told)


def _is_dense_layer(layer: int | None, module: torch.nn.Module, policy: PrefillPolicy) -> bool:
    if layer is None or not policy.dense_layers:
        return False
    return policy.is_dense_layer(layer, getattr(getattr(module, "config", None), "num_hidden_layers", 0))
