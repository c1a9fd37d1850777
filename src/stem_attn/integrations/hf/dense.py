"""Dense attention as the model would have done it without us."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attn.integrations.hf.masks import is_compact, layout, to_dense, to_dense_traced


def attend_densely(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, eager: bool, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attend densely under a mask of any form.

    Args:
        module: The attention module; only its attributes are read.
        query: [B, Hq, L, D].
        key: [B, Hkv, n, D]; places beyond the tokens seen are ignored.
        value: [B, Hkv, n, Dv].
        mask: None, compact, or SDPA's.
        eager: Whether to call the model's own eager function (softcap, sinks, attention weights), not SDPA.
        kwargs: What the model passed besides.

    Returns:
        ([B, L, Hq, Dv], attention weights of the eager function, or None).

    Raises:
        ValueError: The cache holds other keys than those that the mask is for.
    """
    q_len = query.shape[2]
    if mask is not None and is_compact(mask):
        if torch.compiler.is_compiling():
            mask = to_dense_traced(mask, q_len, key.shape[2])
        else:
            check_keys(module, query, key, mask)
            present = layout(mask, query.shape[0], q_len).present
            key, value = key[:, :, :present], value[:, :, :present]
            mask = to_dense(mask, q_len)
    if not eager:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]  # looked up here, since others may replace it
        return sdpa(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    if mask is None and q_len > 1 and is_causal(module, kwargs):  # to eager functions None means no mask at all
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        mask = torch.ones(q_len, q_len, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = zero.where(mask, torch.finfo(query.dtype).min)
    return eager_function(module)(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def check_keys(module: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Check that a layer's keys are those that the mask was made for, as SDPA does.

    Raises:
        ValueError: They are more or fewer: the layers' caches have unequal lengths, or their keys were compressed.
    """
    held = query.shape[2] if mask is None else layout(mask, query.shape[0], query.shape[2]).held
    if key.shape[2] != held and not (mask is None and key.shape[2] > held):  # unused places of a static cache
        layer = getattr(module, "layer_idx", None)
        raise ValueError(
            f"layer {layer} has keys of {key.shape[2]} tokens, but its mask is for {held}: "
            "caches whose layers hold unequal numbers of tokens are not supported"
        )


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call is causal: the argument decides, then the module."""
    told = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def eager_function(module: Any) -> Callable[..., Any]:
    """Return the eager attention of the file that defines a module, or that it says it is defined in.

    Raises:
        ValueError: The file has none under the usual name.
    """
    name = getattr(module, "defined_in", type(module).__module__)
    function = getattr(sys.modules.get(name), "eager_attention_forward", None)
    if function is None:
        raise ValueError(f"{type(module).__name__} needs its own eager attention, and {name} defines none")
    return function  # type: ignore[no-any-return]
