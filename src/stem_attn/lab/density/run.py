"""Time presets that keep the same share of blocks: selection, attention and the whole operation.

One layer of Llama-3.1-8B's shape on random tokens with some structure: neighbours are alike, so that blocks differ, and
heads differ in sharpness, so that heads which share a budget keep unequal shares of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from stem_attn import StemConfig, block_sparse_attention, stem_attention
from stem_attn.lab.errors import InputError
from stem_attn.lab.results import Record
from stem_attn.lab.shapes import SHAPES
from stem_attn.lab.timing import Work, peak_extra_mib, time_rounds
from stem_attn.methods import Stem
from stem_attn.methods.knob import match_density

_ALIKE_TOKENS = 48
_SHARPEST, _FLATTEST = 2.5, 0.3


def draw_inputs(tokens: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [1, Hq, T, D], k and v [1, Hkv, T, D] in bfloat16."""
    shape = SHAPES["llama3-8b"]
    gen = torch.Generator(device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = torch.empty(1, heads, tokens, shape.head_dim, device=device, dtype=torch.bfloat16)
        for head in x[0]:  # one at a time, for memory
            shared = torch.randn(-(-tokens // _ALIKE_TOKENS), shape.head_dim, generator=gen, device=device)
            own = torch.randn(tokens, shape.head_dim, generator=gen, device=device)
            head.copy_(shared.repeat_interleave(_ALIKE_TOKENS, 0)[:tokens] + own)
        return x

    q, k, v = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)
    order = torch.randperm(shape.heads, generator=gen, device=device)
    q *= torch.linspace(_SHARPEST, _FLATTEST, shape.heads, device=device)[order, None, None].to(q.dtype)
    return q, k, v


@torch.inference_mode()
def time_presets(
    presets: Sequence[str], tokens: int, density: float, device: torch.device, rounds: int
) -> list[Record]:
    """Measure presets on one problem, each with its budget scaled to a density.

    Args:
        presets: Names; the first one is what the others are compared with.
        tokens: Length of the prompt.
        density: Kept over causal blocks.
        device: Where to run.
        rounds: Everything is timed once a round.

    Returns:
        A record a preset: its settings, the density it has, milliseconds by part, and the ratio to the first one.

    Raises:
        InputError: A preset cannot have this density at this length.
    """
    q, k, v = draw_inputs(tokens, device, seed=0)
    records: list[Record] = []
    runs: list[Work] = []
    for preset in presets:
        try:
            matched = match_density(Stem(StemConfig.preset(preset)), q, k, v, density, tolerance=0.0)
        except ValueError as error:
            raise InputError(f"preset {preset} at {tokens} tokens: {error}; take longer prompts") from error
        assert isinstance(matched, Stem)
        config, selection = matched.config, matched.select(q, k, v)
        parts: dict[str, Work] = {
            "selection": lambda m=matched: m.select(q, k, v),  # type: ignore[misc]
            "attention": lambda s=selection: block_sparse_attention(q, k, v, s),  # type: ignore[misc]
            "whole": lambda c=config: stem_attention(q, k, v, config=c),  # type: ignore[misc]
        }
        record: Record = {"preset": preset, "tokens": tokens, "asked_density": density, "density": selection.density()}
        record["selection_peak_extra_mib"] = peak_extra_mib(parts["selection"], device)
        records.append(record | {"config": json.loads(config.to_json()), "ms": dict.fromkeys(parts)})
        for run in parts.values():
            run()
        runs += parts.values()
    times = iter(time_rounds(runs, device, rounds)[0])
    for record in records:
        record["ms"] = {part: next(times).describe() for part in record["ms"]}
        record["whole_over_first"] = record["ms"]["whole"]["median"] / records[0]["ms"]["whole"]["median"]
    return records
