"""Which layers keep the dense parent's attention, and why."""

from __future__ import annotations

from typing import Any

from stem_attn.config import StemConfig


def why_dense(
    *,
    attn_type: str,
    sliding_window: int | None,
    alibi_slopes: Any | None,
    logits_soft_cap: float | None,
    sinks: Any | None,
    kv_cache_dtype: str,
) -> str | None:
    """Say why a layer cannot attend sparsely, or return None. The arguments are what vLLM makes its layers from."""
    if attn_type != "decoder":
        return f"{attn_type.replace('_', ' ')} attention"
    if sliding_window is not None:
        return "sliding window"
    if alibi_slopes is not None:
        return "ALiBi"
    if logits_soft_cap:
        return "softcap"
    if sinks is not None:
        return "attention sinks"
    if kv_cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        return f"{kv_cache_dtype} KV cache"
    return None


def is_dense_layer(layer_name: str, config: StemConfig, layers: int) -> bool:
    """Tell whether a layer is one of `config.dense_layers`.

    Args:
        layer_name: vLLM's name of the attention layer, such as `model.layers.3.self_attn.attn`.
        config: The method.
        layers: Layers of the whole model, all pipeline stages together.
    """
    number = _number(layer_name)
    return number is not None and number in {i % layers for i in config.dense_layers if -layers <= i < layers}


def layer_config(layer_name: str, config: StemConfig, layers: int) -> StemConfig:
    """Return a layer's own config, with its factor of `config.layer_budgets`.

    Args:
        layer_name: vLLM's name of the attention layer.
        config: The method.
        layers: Layers of the whole model, all pipeline stages together.

    Raises:
        ValueError: There are not as many factors as layers, or the name does not say which layer it is.
    """
    if not config.layer_budgets:
        return config
    if len(config.layer_budgets) != layers:
        raise ValueError(f"layer_budgets has {len(config.layer_budgets)} factors, and the model has {layers} layers")
    number = _number(layer_name)
    if number is None or number >= layers:
        raise ValueError(f"layer_budgets: {layer_name} is none of the model's {layers} layers")
    return config.for_layer(number)


def _number(layer_name: str) -> int | None:
    return next((int(part) for part in layer_name.split(".") if part.isdigit()), None)
