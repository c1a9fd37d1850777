"""Other ways of choosing blocks, to compare Stem with: all run on the same attention backends.

from stem_attn import baselines, block_sparse_attention

method = baselines.make("xattention", threshold=0.95)
out = block_sparse_attention(q, k, v, method.select(q, k, v))
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from stem_attn.methods import Method, Stem

# Where each method is; imported when asked for.
METHODS = {
    "stem": "stem_attn.baselines.stem:stem",
    "dense": "stem_attn.baselines.dense:Dense",
    "oracle": "stem_attn.baselines.oracle:Oracle",
    "uniform": "stem_attn.baselines.uniform:Uniform",
    "a_shape": "stem_attn.baselines.a_shape:AShape",
    "minference": "stem_attn.baselines.minference:MInference",
    "flexprefill": "stem_attn.baselines.flexprefill:FlexPrefill",
    "xattention": "stem_attn.baselines.xattention:XAttention",
    "flashprefill": "stem_attn.baselines.flashprefill:FlashPrefill",
}


def make(name: str, **params: Any) -> Method:
    """Build a method.

    Args:
        name: One of `METHODS`.
        params: Its fields. Of `"stem"`: `preset`, and fields of `StemConfig`.

    Raises:
        ValueError: The name or a parameter is unknown, or a value is out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    build = getattr(import_module(module), attribute)
    if dataclasses.is_dataclass(build):
        known = [field.name for field in dataclasses.fields(build) if field.init]
        unknown = sorted(set(params) - set(known))
        if unknown:
            raise ValueError(f"unknown parameter of {name}: {', '.join(unknown)}; known: {', '.join(known)}")
    method: Method = build(**params)
    return method


def name_of(method: Method) -> str:
    """Return a method's name in `METHODS`; of another one its class's."""
    if isinstance(method, Stem):
        return "stem"
    names = {where: name for name, where in METHODS.items()}
    return names.get(f"{type(method).__module__}:{type(method).__name__}", type(method).__name__)
