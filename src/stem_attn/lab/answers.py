"""Answers: a prompt is prefilled under every method, and continued densely, all methods' caches together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_STEPS_BETWEEN_LOOKS = 4  # at whether every answer has ended, for which the host waits for the device


@dataclass(slots=True)
class Prefilled:
    """One prompt that a model has read, once or under several methods.

    Args:
        cache: The model's cache, of batch size B.
        logits: float32 [B, V], of the answer's first token.
        tokens: Of the prompt.
    """

    cache: Any
    logits: Tensor
    tokens: int

    def cache_bytes(self) -> int:
        """Return the bytes of its keys and values."""
        layers = [layer for layer in self.cache.layers if getattr(layer, "keys", None) is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.inference_mode()
def read_prompt(model: Any, ids: Tensor) -> Prefilled:
    """Read one prompt, int64 [1, T], with whatever attention the model has now."""
    result = model(ids, use_cache=True, logits_to_keep=1)
    return Prefilled(result.past_key_values, result.logits[:, -1].float(), ids.shape[1])


@torch.inference_mode()
def together(reads: Sequence[Prefilled], room: int) -> list[Prefilled]:
    """Join readings of one prompt to one of a batch, if the kinds of their cache allow it; the caches are used up.

    Args:
        reads: At least one.
        room: Most tokens that will follow the prompt.
    """
    if not all(_is_plain(read.cache) for read in reads):
        return list(reads)
    joined, *others = (read.cache for read in reads)
    for i, layer in enumerate(joined.layers):
        if not layer.is_initialized:  # it uses another layer's keys
            continue
        layers = [layer, *(cache.layers[i] for cache in others)]
        if type(layer) is DynamicLayer:
            joined.layers[i] = _RoomyLayer(layers, room)
        else:
            layer.keys = torch.cat([each.keys for each in layers])
            layer.values = torch.cat([each.values for each in layers])
        for each in layers[1:]:  # so that never more than one layer exists twice
            each.keys = each.values = None
    return [Prefilled(joined, torch.cat([read.logits for read in reads]), reads[0].tokens)]


@torch.inference_mode()
def decode(model: Any, read: Prefilled, new_tokens: int) -> list[list[int]]:
    """Continue a prompt greedily; afterwards its cache ends with the prompt again.

    Args:
        model: A transformers causal language model, its attention dense.
        read: What it has read.
        new_tokens: Most tokens of an answer.

    Returns:
        An answer for each of the batch, with the token that ends it, if it was written.
    """
    cache, token, ends = _fork(read.cache), read.logits.argmax(-1), end_tokens(model)
    stops = torch.tensor(sorted(ends), dtype=torch.long, device=token.device)
    written = [token]
    while len(written) < new_tokens:
        looks = len(written) % _STEPS_BETWEEN_LOOKS == 0
        if looks and bool(torch.isin(torch.stack(written, 1), stops).any(1).all()):
            break
        token = _forward(model, token[:, None], cache, read.tokens + len(written) - 1)[:, -1].argmax(-1)
        written.append(token)
    rows: list[list[int]] = torch.stack(written, 1).tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


@dataclass(frozen=True, slots=True)
class Forced:
    """How a model takes to an answer that it is made to write.

    Args:
        log_probability: Mean of the answer's tokens, in nats.
        own: Whether it is what the model writes greedily by itself.
    """

    log_probability: float
    own: bool


@torch.inference_mode()
def force(model: Any, read: Prefilled, answer: Sequence[int]) -> list[Forced]:
    """Make a model write an answer.

    Args:
        model: A transformers causal language model, its attention dense.
        read: What it has read; afterwards its cache ends with the prompt again.
        answer: At least one token.

    Returns:
        One of each of the batch.
    """
    tokens = torch.tensor(answer, device=read.logits.device)
    logits = [read.logits[:, None]]
    if len(answer) > 1:
        written = tokens[:-1].expand(read.logits.shape[0], -1)
        logits.append(_forward(model, written, _fork(read.cache), read.tokens))
    means, own = [], []
    for row in zip(*logits, strict=True):  # one at a time: in float32 all of them would take gigabytes
        scores = torch.cat([part.float() for part in row]).log_softmax(-1)
        means.append(scores.gather(-1, tokens[:, None]).mean())
        own.append((scores.argmax(-1) == tokens).all())
    return [Forced(*pair) for pair in zip(torch.stack(means).tolist(), torch.stack(own).tolist(), strict=True)]


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end an answer."""
    stop = model.generation_config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer's keys and values with room behind them, so that a further token does not copy all before it.

    Args:
        layers: Of batch size 1 each; joined to one batch.
        room: Tokens that may be added.
    """

    def __init__(self, layers: Sequence[DynamicLayer], room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layers[0].dtype, layers[0].device, True
        self._whole = tuple(_with_room([getattr(layer, name) for layer in layers], room) for name in ("keys", "values"))
        self._end(layers[0].get_seq_length())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the old ones, and return all."""
        old, new = self.get_seq_length(), key_states.shape[-2]
        for whole, states in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, old : old + new] = states
        self._end(old + new)
        return self.keys, self.values

    def _end(self, tokens: int) -> None:
        self.keys, self.values = (whole[:, :, :tokens] for whole in self._whole)


def _with_room(parts: list[Tensor], room: int) -> Tensor:
    """Join tensors [1, H, T, D] to [B, H, T + room, D]."""
    _, heads, tokens, dim = parts[0].shape
    whole = parts[0].new_empty(len(parts), heads, tokens + room, dim)
    for row, part in zip(whole, parts, strict=True):
        row[:, :tokens] = part[0]
    return whole


def _forward(model: Any, ids: Tensor, cache: Any, first: int) -> Tensor:
    """Return the logits, [B, T, V], of tokens int64 [B, T] that stand from position `first` on."""
    positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand(ids.shape)
    logits: Tensor = model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
    return logits


def _is_plain(cache: Any) -> bool:
    """Tell whether a cache's layers never write into the tensors that held the prompt."""
    return {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer, _RoomyLayer}


def _fork(cache: Any) -> Any:
    """Return a cache that may grow while the given one stays; they share the prompt's tensors where they can."""
    if not _is_plain(cache):
        return copy.deepcopy(cache)
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
