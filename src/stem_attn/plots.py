"""Pictures of what was kept. matplotlib is imported when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEPT, PRUNED = (0, 114, 178), (213, 94, 0)
"""Blue and orange that colour-blind readers tell apart (Okabe and Ito), as red, green, blue of 255."""
LEAST_MASS = 1e-4
"""Of a row's attention; a block with less is drawn as one with none."""
_FAINTEST = 0.2  # of a kept block with no mass: it is still seen that it was kept
_OTHER = "#7f7f7f"


def strength(mass: Tensor) -> Tensor:
    """Map attention mass to how strongly a block is drawn: 0 at `LEAST_MASS` and below, 1 at all of a row's mass."""
    return (1 - mass.clamp(min=LEAST_MASS, max=1).log() / math.log(LEAST_MASS)).clamp(0, 1)


def colors(kept: Tensor, strengths: Tensor | None) -> Tensor:
    """Colour blocks: blue what is kept, orange what is pruned, stronger the more attention falls on it.

    Args:
        kept: float [..., Qb, Kb]; 1 kept, 0 pruned, or the share of heads that keep.
        strengths: float [..., Qb, Kb] from 0 to 1; None: pruned blocks stay white.

    Returns:
        float32 [..., Qb, Kb, 3]: red, green and blue from 0 to 1.
    """
    kept = kept.float()
    shown = kept if strengths is None else strengths.float().maximum(kept * _FAINTEST)
    blue, orange = (torch.tensor(color, dtype=torch.float32, device=kept.device) / 255 for color in (KEPT, PRUNED))
    own = orange + kept[..., None] * (blue - orange) if strengths is not None else blue
    return 1 - shown[..., None] * (1 - own)


def draw_blocks(kept: Tensor, mass: Tensor | None, *, rows: tuple[int, int], title: str, axes: Any = None) -> Any:
    """Draw kept blocks, query blocks downward and key blocks to the right.

    Args:
        kept: float [Qb, Kb]; see `colors`.
        mass: float [Qb, Kb], each row's attention by key block, or None.
        rows: Absolute block of the first query row, and the one after the last.
        title: Above the picture.
        axes: matplotlib axes to draw into; None: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panel = axes if axes is not None else _new_axes(5.5, 5.5)
    picture = colors(kept, None if mass is None else strength(mass)).cpu().numpy()
    first, last = rows
    panel.imshow(picture, extent=(0, kept.shape[1], last, first), interpolation="nearest", aspect="equal")
    panel.set(xlabel="key block", ylabel="query block")
    panel.set_title(title, fontsize=10)
    return panel


def draw_calls(calls: Mapping[str, int], *, title: str, axes: Any = None) -> Any:
    """Draw how many attention calls were of which kind, as bars.

    Args:
        calls: Numbers by kind; `sparse` is drawn in the colour of what is kept.
        title: Above the picture.
        axes: matplotlib axes to draw into; None: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panel = axes if axes is not None else _new_axes(6.5, 1.3 + 0.4 * len(calls))
    names = list(calls)[::-1]  # matplotlib's first bar is the lowest one
    blue = tuple(part / 255 for part in KEPT)
    bars = panel.barh(names, [calls[name] for name in names], color=[blue if n == "sparse" else _OTHER for n in names])
    panel.bar_label(bars, padding=3)
    panel.margins(x=0.12)
    panel.set_xlabel("attention calls")
    panel.set_title(title, fontsize=10)
    return panel


def _new_axes(width: float, height: float) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]
