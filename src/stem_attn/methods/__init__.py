"""Ways of choosing blocks: Stem and its rivals. All run on the same attention backends, in every layout.

from stem_attn import methods, stem_attention

out = stem_attention(q, k, v, method=methods.make("xattention", threshold=0.95))
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from stem_attn.method import Method
from stem_attn.methods.stem import Stem

__all__ = ["METHODS", "Method", "Stem", "make", "name_of"]

# Where each method is; imported when asked for.
METHODS = {
    "stem": "stem_attn.methods.stem:stem",
    "dense": "stem_attn.methods.dense:Dense",
    "oracle": "stem_attn.methods.oracle:Oracle",
    "uniform": "stem_attn.methods.uniform:Uniform",
    "a_shape": "stem_attn.methods.a_shape:AShape",
    "minference": "stem_attn.methods.minference:MInference",
    "flexprefill": "stem_attn.methods.flexprefill:FlexPrefill",
    "xattention": "stem_attn.methods.xattention:XAttention",
    "flashprefill": "stem_attn.methods.flashprefill:FlashPrefill",
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
