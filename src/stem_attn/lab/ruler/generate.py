"""Greedy answers: prompts are prefilled one by one, and their answers decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(slots=True)
class Prefilled:
    """A prompt that a model has read.

    Args:
        cache: The model's cache, of batch size 1.
        token: int64 [1], the answer's first token.
        tokens: Of the prompt.
    """

    cache: Any
    token: Tensor
    tokens: int

    def cache_bytes(self) -> int:
        """Return the bytes of its keys and values."""
        layers = [layer for layer in self.cache.layers if getattr(layer, "keys", None) is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.inference_mode()
def read_prompt(model: Any, ids: Tensor) -> Prefilled:
    """Read one prompt, int64 [1, T], with whatever attention the model has now."""
    result = model(ids, use_cache=True, logits_to_keep=1)
    return Prefilled(result.past_key_values, result.logits[0, -1:].argmax(-1), ids.shape[1])


@torch.inference_mode()
def decode(model: Any, prompts: Sequence[Prefilled], new_tokens: int) -> list[list[int]]:
    """Continue prompts greedily, together where the kinds of their cache allow it. The caches are used up.

    Args:
        model: A transformers causal language model, its attention dense.
        prompts: What it has read.
        new_tokens: Most tokens of an answer.

    Returns:
        Each prompt's answer, without the token that ends it.
    """
    kinds = {type(layer) for prompt in prompts for layer in prompt.cache.layers}
    if len(prompts) > 1 and not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return [answer for prompt in prompts for answer in decode(model, [prompt], new_tokens)]

    token = torch.cat([prompt.token for prompt in prompts])
    lengths = torch.tensor([prompt.tokens for prompt in prompts], device=token.device)
    longest = max(prompt.tokens for prompt in prompts)
    present = torch.arange(longest + new_tokens, device=token.device) >= longest - lengths[:, None]
    padded = any(prompt.tokens < longest for prompt in prompts)
    cache = _joined([prompt.cache for prompt in prompts], longest)
    stop = model.generation_config.eos_token_id
    stops = torch.tensor([] if stop is None else stop, dtype=torch.long, device=token.device).flatten()

    written = [token]
    stopped = torch.isin(token, stops)
    while len(written) < new_tokens and not bool(stopped.all()):
        step = len(written)
        logits = model(
            token[:, None],
            past_key_values=cache,
            position_ids=(lengths + step - 1)[:, None],
            attention_mask=present[:, : longest + step].long() if padded else None,
            use_cache=True,
        ).logits
        token = logits[:, -1].argmax(-1)
        stopped |= torch.isin(token, stops)
        written.append(token)
    ends = set(stops.tolist())
    rows = torch.stack(written, dim=1).tolist()
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


def _joined(caches: list[Any], longest: int) -> Any:
    """Join caches of one prompt each to one of a batch, padded on the left; the first one is overwritten."""
    joined = caches[0]
    if len(caches) == 1:
        return joined
    for i, layer in enumerate(joined.layers):
        if not layer.is_initialized:  # it uses another layer's keys
            continue
        for name in ("keys", "values"):
            parts = [getattr(cache.layers[i], name) for cache in caches]
            tokens = max(part.shape[2] for part in parts)
            setattr(layer, name, torch.cat([F.pad(part, (0, 0, tokens - part.shape[2], 0)) for part in parts]))
            for cache in caches[1:]:  # so that never more than one layer exists twice
                setattr(cache.layers[i], name, None)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = longest
    return joined
