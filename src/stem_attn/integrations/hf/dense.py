"""Dense attention as the model would have done it without us."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attn.integrations.hf import masks


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, eager: bool, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attend densely under a mask of any form.

    Args:
        module: The attention module; only its attributes are read.
        query: [B, Hq, L, D].
        key: [B, Hkv, n, D]; places beyond the tokens seen are ignored.
        value: [B, Hkv, n, Dv].
        mask: None, compact, or 4-D.
        eager: Whether to call the model's own eager function (softcap and sinks), not SDPA.
        kwargs: What the model passed besides.

    Returns:
        ([B, L, Hq, Dv], attention weights of the eager function, or None).
    """
    q_len = query.shape[2]
    if mask is not None and mask.ndim == 2:
        keys = masks.present_keys(mask, key)
        key, value = key[:, :, :keys], value[:, :, :keys]
        mask = masks.to_dense(mask, q_len, keys)
    if not eager:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]  # looked up here, since others may replace it
        return sdpa(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    if mask is None and q_len > 1:  # to eager functions None means no mask at all
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        mask = torch.ones(q_len, q_len, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager_function(module)(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def eager_function(module: Any) -> Callable[..., Any]:
    """Return the eager attention of the file that defines a module.

    Raises:
        ValueError: The file has none under the usual name.
    """
    name = type(module).__module__
    function = getattr(sys.modules.get(name), "eager_attention_forward", None)
    if function is None:
        raise ValueError(f"{type(module).__name__} needs its own eager attention, and {name} defines none")
    return function  # type: ignore[no-any-return]
