"""Whether a model's attention can be computed as a config asks: known once the model is loaded, before any work."""

from __future__ import annotations

from typing import Any

from stem_attn import backends
from stem_attn.config import StemConfig
from stem_attn.lab.errors import InputError


def check_can_attend(model: Any, *methods: Any) -> None:
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
        try:
            backends.check_ahead("auto", config, head_dim=dim, dtype=model.dtype, device=model.device)
        except ValueError as error:
            raise InputError(str(error)) from error
