"""Put a function of ours in the place of a model's full causal attention; sliding-window layers stay exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attn.integrations import hf
from stem_attn.integrations.hf.dense import attend_densely
from stem_attn.integrations.hf.forward import stem_attention_forward, why_dense
from stem_attn.integrations.hf.properties import properties_of
from stem_attn.integrations.hf.register import NAME
from stem_attn.lab.errors import InputError
from stem_attn.policy import PrefillPolicy

Attend = Callable[[int, Tensor, Tensor, Tensor, float | None], Tensor]
"""Called with a layer's index, q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] and the scale; returns the
attention output [B, Hq, T, Dv]."""


@contextmanager
def intercept(model: Any, attend: Attend) -> Iterator[Counter[str]]:
    """Route the prefill of a model's full attention layers through a function, inside a `with` block.

    The Hugging Face adapter is switched on, so that whatever is not plain causal attention over the whole prompt goes
    its way: exact bands for sliding-window layers, dense attention for the rest.

    Args:
        model: A transformers causal language model, run without padding and without a cache.
        attend: What takes the place of full causal attention.

    Yields:
        Calls that did not reach `attend`, by reason.

    Raises:
        InputError: The model's attention cannot be routed.
    """
    others: Counter[str] = Counter()

    def call(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        reason = why_dense(module, query, key, value, attention_mask, dropout, kwargs)
        if reason is None and attention_mask is not None:
            reason = "sliding window or padding"
        if reason is None and properties_of(query, kwargs)[0].any:  # `attend` knows of none
            others["softcap or sinks"] += 1
            how = {"dropout": dropout, "scaling": scaling, **kwargs}
            return attend_densely(module, query, key, value, attention_mask, eager=True, **how)
        if reason is not None:
            others[reason] += 1
            return stem_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return attend(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None

    try:
        hf.enable(model, policy=PrefillPolicy(min_seq_len=0, crossover=False))
    except ValueError as error:
        raise InputError(str(error)) from error
    ALL_ATTENTION_FUNCTIONS[NAME] = call  # shadows the registered function
    try:
        yield others
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
        hf.disable(model)
