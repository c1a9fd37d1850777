"""Which layers keep the dense parent's attention, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from stem_attn.config import StemConfig
from stem_attn.integrations.vllm.settings import Settings


def why_dense(
    *,
    attn_type: str,
    sliding_window: int | None,
    alibi_slopes: Any | None,
    kv_cache_dtype: str,
    readable: Collection[str],
) -> str | None:
    """Say why a layer cannot attend sparsely, or return None.

    The arguments are what vLLM makes its layers from, and which dtypes of a cache the device's backend reads.
    """
    if attn_type != "decoder":
        return f"{attn_type.replace('_', ' ')} attention"
    if sliding_window is not None:
        return "sliding window"
    if alibi_slopes is not None:
        return "ALiBi"
    if kv_cache_dtype not in readable:
        return f"{kv_cache_dtype} KV cache"
    return None


def layer_index(layer_name: str) -> int | None:
    """Return the index that vLLM's name of a layer holds, as 3 in `model.layers.3.self_attn.attn`; None: none."""
    return next((int(part) for part in layer_name.split(".") if part.isdigit()), None)


@lru_cache(maxsize=4096)  # every call of every layer asks
def layer_config(layer_name: str, settings: Settings, layers: int) -> StemConfig | None:
    """Return a layer's own config, with its factor of the budget; None: the layer is dense by these settings.

    Args:
        layer_name: vLLM's name of the attention layer.
        settings: Their policy is checked against the number of layers.
        layers: Layers of the whole model, all pipeline stages together.

    Raises:
        ValueError: There are factors, and the name does not say which layer it is.
    """
    policy, index = settings.policy, layer_index(layer_name)
    if index is None:
        if policy.layer_budgets:
            raise ValueError(f"layer_budgets: {layer_name} does not say which of the model's layers it is")
        return settings.config
    if policy.is_dense_layer(index, layers):
        return None
    return policy.layer_config(settings.config, index, layers)


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return what layers do as a table, for the log.

    Args:
        rows: Of each layer vLLM's name, its attention, and why.
    """
    lines = [("layers", "attention", "why")]
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, attention, why in rows:
        kinds.setdefault((attention, why), []).append(name)
    for (attention, why), names in kinds.items():
        told = [layer_index(name) for name in names]
        known = [index for index in told if index is not None]
        lines.append((_ranges(known) if len(known) == len(names) else ", ".join(names), attention, why))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers as `0-3, 7`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
