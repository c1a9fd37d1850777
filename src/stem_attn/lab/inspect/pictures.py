"""The pictures of `stem-attn inspect`, for where a page cannot go: all heads, numbers by layer, the worst head."""

from __future__ import annotations

import io
from typing import Any

import torch

from stem_attn import plots
from stem_attn.lab.inspect.pack import shrunk
from stem_attn.lab.inspect.run import STEPS, Found, Layer
from stem_attn.lab.results import Record

_DPI = 130
_THUMBNAIL = 40


def draw(record: Record, found: Found) -> dict[str, bytes]:
    """Draw a record.

    Args:
        record: The numbers.
        found: The blocks.

    Returns:
        PNG files by name.
    """
    return {"heads.png": _heads(record, found), "layers.png": _layers(record), "worst_head.png": _worst(record, found)}


def _heads(record: Record, found: Found) -> bytes:
    """Draw every head as a small picture; what there is more of, layers or heads, goes to the right."""
    layers, heads, methods = len(found.layers), found.layers[0].mass.shape[0], len(found.outcomes)
    wide = layers > heads
    across, down = max(layers, heads), min(layers, heads)
    width = min(max(0.55 * across, 4), 14)
    height = width * down / across + 0.8
    if wide:
        figure, axes = _figure(methods, 1, width, height * methods)
    else:
        figure, axes = _figure(1, methods, width * methods, height)
    for place, panel in enumerate(axes):
        tiles = torch.stack([torch.stack(_thumbnails(layer, found.rows, place)) for layer in found.layers])
        rows = (tiles.transpose(0, 1) if wide else tiles).unbind(0)
        picture = torch.cat([torch.cat(row.unbind(0), 1) for row in rows])
        panel.imshow(picture.numpy(), interpolation="nearest", extent=(0, across, down, 0), aspect="auto")
        panel.set(xlabel="layer" if wide else "head", xticks=_ticks(across))
        panel.set(ylabel="head" if wide else "layer", yticks=_ticks(down))
        label = panel.set_xticklabels if wide else panel.set_yticklabels
        label([found.layers[i].index for i in _ticks(layers)])
        panel.set_title(f"{record['methods'][place]['name']}: blue kept, orange pruned", fontsize=10)
    return _png(figure)


def _thumbnails(layer: Layer, rows: list[int], place: int) -> list[torch.Tensor]:
    size = min(_THUMBNAIL, len(rows)), min(_THUMBNAIL, layer.mass.shape[2])
    mass, kept = shrunk(layer, rows, size)
    pictures = torch.nn.functional.pad(plots.colors(kept[place], mass / STEPS), (0, 0, 0, 3, 0, 3), value=0.6)
    return list(pictures)


def _layers(record: Record) -> bytes:
    """Draw density and lost attention by layer: the mean of the heads, and their range."""
    figure, axes = _figure(1, 2, 12, 4)
    layers = [layer["layer"] for layer in record["layers"]]
    for panel, field, label in zip(
        axes, ("density", "lost"), ("density (kept over causal blocks)", "attention on pruned blocks"), strict=True
    ):
        for place, one in enumerate(record["methods"]):
            by_head = [layer["methods"][place][f"{field}_by_head"] for layer in record["layers"]]
            color = tuple(part / 255 for part in (plots.KEPT, plots.PRUNED)[place])
            mean = [layer["methods"][place][field] for layer in record["layers"]]
            panel.plot(layers, mean, color=color, marker="os"[place], markersize=4, label=one["name"])
            panel.fill_between(layers, list(map(min, by_head)), list(map(max, by_head)), color=color, alpha=0.15)
        panel.set(xlabel="layer", ylim=(0, None))
        panel.set_title(f"{label}; mean and range of the heads", fontsize=10)
        panel.legend(frameon=False, fontsize=8)
    return _png(figure)


def _worst(record: Record, found: Found) -> bytes:
    """Draw the head that lost most, as every method keeps it."""
    worst = max(record["methods"], key=lambda one: one["worst"]["lost"])["worst"]
    layer = next(layer for layer in found.layers if layer.index == worst["layer"])
    steps = layer.mass[worst["head"]].float() / STEPS
    figure, axes = _figure(1, len(layer.kept), 5.5 * len(layer.kept), 5.5)
    for panel, kept, one in zip(axes, layer.kept, record["methods"], strict=True):
        lost = kept.lost_by_head[worst["head"]]
        plots.draw_blocks(
            kept.blocks[worst["head"]].float(),
            torch.where(steps > 0, plots.LEAST_MASS ** (1 - steps), torch.zeros(())),
            rows=(0, found.grid.k_blocks),
            title=f"{one['name']}, layer {worst['layer']}, head {worst['head']}: {lost:.1%} of the attention pruned",
            axes=panel,
        )
    return _png(figure)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 8)))


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, dpi=_DPI, format="png")
    return image.getvalue()
