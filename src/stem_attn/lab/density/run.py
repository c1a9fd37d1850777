"""Time methods that keep the same share of blocks: selection, attention and the whole operation.

    python benchmarks/equal_density.py --lengths 32768,65536,131072 --densities 0.12,0.22 --out h100-equal-density

One layer of Llama-3.1-8B's shape on random tokens with some structure: neighbours are alike, so that blocks differ, and
heads differ in sharpness, so that heads which share a budget keep unequal shares of it. The first method named is the
one that the others are compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from stem_attn import StemConfig, block_sparse_attention, stem_attention
from stem_attn.baselines.knob import match_density
from stem_attn.lab import machine
from stem_attn.lab.bench.shapes import SHAPES
from stem_attn.lab.timing import peak_extra_mib, time_rounds
from stem_attn.methods import Stem

ALIKE_TOKENS = 48
SHARPEST, FLATTEST = 2.5, 0.3


def draw_inputs(tokens: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [1, Hq, T, D], k and v [1, Hkv, T, D] in bfloat16."""
    shape = SHAPES["llama3-8b"]
    gen = torch.Generator(device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = torch.empty(1, heads, tokens, shape.head_dim, device=device, dtype=torch.bfloat16)
        for head in x[0]:  # one at a time, for memory
            shared = torch.randn(-(-tokens // ALIKE_TOKENS), shape.head_dim, generator=gen, device=device)
            own = torch.randn(tokens, shape.head_dim, generator=gen, device=device)
            head.copy_(shared.repeat_interleave(ALIKE_TOKENS, 0)[:tokens] + own)
        return x

    q, k, v = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)
    order = torch.randperm(shape.heads, generator=gen, device=device)
    q *= torch.linspace(SHARPEST, FLATTEST, shape.heads, device=device)[order, None, None].to(q.dtype)
    return q, k, v


@torch.inference_mode()
def compare(presets: list[str], tokens: int, density: float, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Measure the presets on one problem.

    Returns:
        A record a preset: its settings, the density it has, milliseconds by part, and the ratio to the first one.
    """
    q, k, v = draw_inputs(tokens, device, seed=0)
    records, runs = [], []
    for preset in presets:
        matched = match_density(Stem(StemConfig.preset(preset)), q, k, v, density, tolerance=0.0)
        assert isinstance(matched, Stem)
        config, selection = matched.config, matched.select(q, k, v)
        parts = {
            "selection": lambda m=matched: m.select(q, k, v),
            "attention": lambda s=selection: block_sparse_attention(q, k, v, s),
            "whole": lambda c=config: stem_attention(q, k, v, config=c),
        }
        record = {"preset": preset, "tokens": tokens, "asked_density": density, "density": selection.density()}
        record["selection_peak_extra_mib"] = peak_extra_mib(parts["selection"], device)
        records.append(record | {"config": json.loads(config.to_json()), "ms": dict.fromkeys(parts)})
        for run in parts.values():
            run()
        runs += parts.values()
    times = iter(time_rounds(runs, device, rounds)[0])
    for record in records:
        for part in record["ms"]:
            t = next(times)
            record["ms"][part] = {"median": t.median, "min": t.low, "max": t.high}
        record["whole_over_first"] = record["ms"]["whole"]["median"] / records[0]["ms"]["whole"]["median"]
    return records


def main(
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "32768,65536,131072",
    densities: Annotated[str, typer.Option(help="Kept over causal blocks, separated by commas.")] = "0.12,0.22",
    presets: Annotated[str, typer.Option(help="The first one is compared with.")] = "official,default",
    rounds: Annotated[int, typer.Option(help="Every method is timed once a round.")] = 15,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for equal_density.json.")] = Path("equal-density"),
) -> None:
    """Print a line a preset, length and density, and write every number."""
    where = torch.device(device)
    records = []
    for tokens in map(int, lengths.split(",")):
        for density in map(float, densities.split(",")):
            made = compare(presets.split(","), tokens, density, where, rounds)
            records += made
            for r in made:
                ms = ", ".join(f"{part} {times['median']:.3f}" for part, times in r["ms"].items())
                typer.echo(
                    f"{tokens} tokens, {r['preset']:8s} density {r['density']:.4f}, ms: {ms}; "
                    f"whole over {presets.split(',')[0]} {r['whole_over_first']:.3f}"
                )
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.describe(where), "rounds": rounds, "records": records}
    (out / "equal_density.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
