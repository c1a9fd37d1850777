"""Which models cannot run with Stem, and why: asked of their code, not of a list of names."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any

from transformers import PreTrainedModel

from stem_attn.integrations.hf.properties import NEED_EAGER
from stem_attn.policy import PrefillPolicy


def why_refused(model: PreTrainedModel, policy: PrefillPolicy) -> str | None:
    """Say why a model's attention cannot be routed, as the end of a sentence, or return None."""
    text = model.config.get_text_config()
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config.get_text_config() is m.config]
    for part in [model, *parts]:
        if not part._can_set_attn_implementation():
            return f"{type(part).__name__} does not call its attention through transformers' attention interface"
    if any(name.rpartition(".")[2] == "indexer" for name, _ in model.named_modules()):
        return "it has trained sparse attention (an indexer), which Stem would replace"
    if not any(calls_interface(type(m)) for m in model.modules()):
        return "it has no attention layers that call the attention interface"
    kinds: set[Any] = {type(m) for m in model.modules()}
    if any(_cuts_masks(kind) for kind in kinds):
        return "its attention computes with masks, and does not ask for ones of which every pair is given"
    for part in parts:
        if not part._supports_sdpa and not all(_only_adds_to_sdpa(type(m)) for m in part.modules()):
            return f"{text.model_type} does not support SDPA, to which dense calls go"
    try:
        policy.check_layers(layer_count(model))
    except ValueError as error:
        return str(error)
    return None


def layer_count(model: PreTrainedModel) -> int:
    """Return how many layers a model has: by its text config, or more if some have been added since."""
    indices = [getattr(m, "layer_idx", None) for m in model.modules() if calls_interface(type(m))]
    told: int = model.config.get_text_config().num_hidden_layers
    return max(told, *(index + 1 for index in indices if isinstance(index, int)), 0)


def _only_adds_to_sdpa(kind: type) -> bool:
    """Tell whether an attention layer differs from SDPA by arguments alone that we give to its eager function.

    Models without SDPA support have softcap or sinks, which they hand to the interface; or they do something of their
    own with masks, which would meet ours.
    """
    tree = _interface_code(kind)
    if tree is None:
        return True
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "attention_interface":
            passed = [*call.args, *(k.value for k in call.keywords)]
            uses = [n for n in names if n.id == "attention_mask" and n not in passed]
            return not uses and any(k.arg in NEED_EAGER for k in call.keywords)
    return False


@functools.cache
def _cuts_masks(kind: Any) -> bool:
    """Tell whether an attention layer cuts masks (Doge), although its model may get None or ours."""
    if not calls_interface(kind) or "allow_is_causal_skip=False" in inspect.getsource(sys.modules[kind.__module__]):
        return False
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind))))
    return any(
        isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id == "attention_mask" for n in nodes
    )


def calls_interface(kind: type) -> bool:
    """Tell whether a module class calls its attention through transformers' attention interface."""
    return _interface_code(kind) is not None


@functools.cache
def _interface_code(kind: type) -> ast.Module | None:
    """Return the code of a module class's forward if that calls the attention interface."""
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # no source, for instance of a class defined in a session
        return None
    return ast.parse(textwrap.dedent(source)) if "ALL_ATTENTION_FUNCTIONS" in source else None
