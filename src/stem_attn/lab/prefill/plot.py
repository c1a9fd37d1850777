"""Draw a prefill comparison: time, memory and attention's share, dense beside Stem."""

from __future__ import annotations

import io
from typing import Any

from stem_attn.lab import machine
from stem_attn.lab.results import Record

# Told apart by colour-blind readers, and by their hatching in grey.
_ATTENTION, _REST = "#0072b2", "#b3b3b3"
_MIB = 2**20


def draw(found: Record) -> bytes:
    """Draw the record that `stem-attn prefill --json` writes, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")  # not pyplot's, which would keep it
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_seconds(found, left)
    _draw_memory(found, right)
    figure.suptitle(_title(found), fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _draw_seconds(found: Record, axes: Any) -> None:
    sides = [found["dense"], found["stem"]]
    attention = [side["attention_seconds"] for side in sides]
    rest = [side["prefill_seconds"] - side["attention_seconds"] for side in sides]
    axes.bar(("dense", "stem"), rest, color=_REST, label="the rest of the model", width=0.6)
    axes.bar(("dense", "stem"), attention, bottom=rest, color=_ATTENTION, hatch="//", label="attention", width=0.6)
    for x, side in enumerate(sides):
        seconds = side["prefill_seconds"]
        axes.annotate(f"{seconds:.2f} s", (x, seconds), (0, 3), textcoords="offset points", ha="center")
    axes.set_ylabel("seconds")
    axes.set_title(_faster("time to first token", *(side["prefill_seconds"] for side in sides)), fontsize=10)
    axes.margins(y=0.15)
    axes.legend(fontsize=8, loc="lower left")


def _draw_memory(found: Record, axes: Any) -> None:
    mib = [found[side]["peak_bytes"] / _MIB for side in ("dense", "stem")]
    axes.bar(("dense", "stem"), mib, color=_REST, width=0.6)
    for x, height in enumerate(mib):
        axes.annotate(f"{height:.0f}", (x, height), (0, 3), textcoords="offset points", ha="center")
    axes.set_ylabel("MiB over the model")
    axes.set_title("peak memory", fontsize=10)
    axes.margins(y=0.15)


def _faster(what: str, dense: float, stem: float) -> str:
    return f"{what}: dense takes {dense / stem:.2f} times as long"


def _title(found: Record) -> str:
    tokens, kept = found["prompt"]["tokens"], found["density"]
    where = machine.name(found["machine"])
    return (
        f"{found['model']}, {found['dtype']}, {tokens} tokens, {kept:.0%} of the blocks kept; {where}\n"
        f"same next token at {found['top1_agreement']:.1%} of the positions, KL {found['mean_kl_nats']:.4f} nats"
    )
