"""Whether a model's attention can be computed as a config asks: known once the model is loaded, before any work."""

from __future__ import annotations

from typing import Any

import torch

from stem_attn import backends
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.lab.errors import InputError
from stem_attn.layout import Layout


def check_attention(model: Any, *methods: Any) -> None:
    """Check that a backend computes what is asked for by name: another precision than the model's.

    Args:
        model: A transformers causal language model, where it will run.
        methods: Configs, or methods; of these only those count that have a config.

    Raises:
        InputError: None does; it says why.
    """
    shape = model.config.get_text_config()
    dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    for config in (x if isinstance(x, StemConfig) else getattr(x, "config", None) for x in methods):
        if not isinstance(config, StemConfig) or config.precision == "auto":
            continue
        one = torch.empty(1, 1, 1, dim, dtype=model.dtype, device=model.device)
        call = Call(Layout.dense(one, one, one), config.block_size, 1.0, precision=config.precision)
        try:
            backends.for_call("auto", call, again=True)  # prompts tell what automatic choice passes over
        except ValueError as error:
            raise InputError(str(error)) from error
