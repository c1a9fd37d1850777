"""Configs of a model's own: an attention implementation stands in a config object, which other models may share."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

Swap = list[tuple[Any, Any]]
"""Pairs of a config that was exchanged and the one that took its place."""


def take_own(model: PreTrainedModel) -> Swap:
    """Give a model copies of its configs, so that changing their implementation changes no other model.

    Args:
        model: A transformers model.

    Returns:
        (shared, own) pairs for `give_back`.
    """
    found: dict[int, Any] = {}
    todo = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None]
    swap = [(config, copy.copy(config)) for config in found.values()]
    for _, own in swap:
        _exchange(own, swap)
    exchange(model, swap)
    return swap


def exchange(model: PreTrainedModel, swap: Swap) -> None:
    """Put the second config of every pair where a part of the model has the first."""
    for module in model.modules():
        _exchange(module, swap)


def give_back(model: PreTrainedModel, swap: Swap, implementation: str) -> None:
    """Undo `take_own` and whatever has happened to the implementations since.

    If somebody has changed something else in the configs, the model keeps its own ones, so that the change is not lost.

    Args:
        model: The model.
        swap: What `take_own` returned.
        implementation: A name that configs do not get back even if they had it: they get SDPA's.
    """
    for shared, own in swap:
        before = shared._attn_implementation
        own._attn_implementation = {"": "sdpa" if before == implementation else before}  # this config only, no parts
    back = [(own, shared) for shared, own in swap]
    owns = {id(own): shared for shared, own in swap}
    if all(_same(shared, own, owns) for shared, own in swap):
        exchange(model, back)


def _same(shared: Any, own: Any, owns: dict[int, Any]) -> bool:
    before, now = vars(shared), {name: owns.get(id(value), value) for name, value in vars(own).items()}
    return before.keys() == now.keys() and all(before[name] is now[name] for name in before)


def _exchange(holder: Any, swap: Swap) -> None:
    """Put the second of every pair where an object's attributes are the first."""
    new = {id(old): new for old, new in swap}
    for name, value in vars(holder).items():
        if id(value) in new:
            vars(holder)[name] = new[id(value)]
