"""The plot: milliseconds and speed-up by length."""

from __future__ import annotations

import io
from typing import Any

from stem_attn.lab import machine
from stem_attn.lab.results import Record

# Colour-blind safe; one colour a kernel in every plot.
_COLORS = {
    "sdpa": "#d55e00",
    "fa2": "#d55e00",
    "cudnn": "#e69f00",
    "fa4-dense": "#cc79a7",
    "flex": "#7f7f7f",
    "fa4": "#009e73",
    "triton": "#0072b2",
    "cpu": "#0072b2",
}
_EXTENDED = "#000000"
"""A kernel with a softcap, sinks or 8 bits, beside the same without."""
_STYLES = {"dense": ("--", "s"), "attention": ("-", "o"), "whole": ("-", "D"), "selection": (":", "^")}


def draw(report: Record) -> bytes:
    """Draw a report as a PNG: left milliseconds (log-log), right speed-up with the ideal 1 / density.

    Args:
        report: Of the attention benchmark or of the whole-model one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    draw_both = _draw_ttft if report["settings"]["kind"] == "ttft" else _draw_attention
    title = draw_both(report, left, right)
    lengths = sorted({case["k_len"] for case in report["cases"]})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
        axes.set_xlabel("tokens")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    plain = FuncFormatter(lambda y, _: f"{y:g}")
    low, high = left.get_ylim()
    left.yaxis.set_major_formatter(plain)
    left.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())  # few decades have few major ticks
    right.set_ylim(bottom=0)
    right.axhline(1, color="#999999", linewidth=0.8)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    pyplot.close(figure)
    return image.getvalue()


def _draw_attention(report: Record, left: Any, right: Any) -> str:
    series: dict[tuple[str, str], list[tuple[int, Record]]] = {}
    for case in report["cases"]:
        for m in case["methods"]:
            series.setdefault((m["name"], m["part"]), []).append((case["k_len"], m))
    for (name, part), points in series.items():
        line, marker = _STYLES[part]
        ms = [m["ms"] for _, m in points]
        left.errorbar(
            [length for length, _ in points],
            [t["median"] for t in ms],
            [[t["median"] - t["min"] for t in ms], [t["max"] - t["median"] for t in ms]],
            linestyle=line,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            color=_color(name),
            alpha=0.5 if part == "attention" and (name, "whole") in series else 1,
            label=f"{name.removesuffix('-dense')} {part}",
        )
    for base in (name for name, part in series if part == "dense"):
        points = []
        for case in report["cases"]:
            ratios = [m["speedup"][base] for m in case["methods"] if m["part"] == "whole" and base in m["speedup"]]
            if ratios:
                points.append((case["k_len"], max(ratios)))
        if points:
            right.plot(
                *zip(*points, strict=True),
                color=_COLORS[base],
                marker="D",
                markersize=5,
                label=f"over {base.removesuffix('-dense')}",
            )
            right.annotate(f"{points[-1][1]:.2f}", points[-1], (8, -3), textcoords="offset points", fontsize=9)
    ideal = [(case["k_len"], case["ideal_speedup"]) for case in report["cases"]]
    right.plot(
        *zip(*ideal, strict=True), color="#444444", linestyle=(0, (1, 1)), linewidth=1.6, label="ideal 1/density"
    )
    left.set_ylabel("milliseconds (median; bars: fastest and slowest)")
    right.set_ylabel("times faster than dense, selection included")
    left.set_title("time", fontsize=10)
    right.set_title("speed-up of the fastest whole operation", fontsize=10)
    case = report["cases"][0]
    return (
        f"{case['heads']}/{case['kv_heads']} heads of {case['head_dim']}, batch {case['batch']}, "
        f"{report['settings']['dtype']}, preset {report['settings']['preset']}, {machine.name(report['machine'])}"
    )


def _draw_ttft(report: Record, left: Any, right: Any) -> str:
    cases = report["cases"]
    lengths = [case["k_len"] for case in cases]
    for name, color, line in (("dense", _COLORS["cudnn"], "--"), ("stem", _COLORS["triton"], "-")):
        times = [case[name]["s"] for case in cases]
        bars = [[t["median"] - t["min"] for t in times], [t["max"] - t["median"] for t in times]]
        left.errorbar(lengths, [t["median"] for t in times], bars, color=color, linestyle=line, marker="o", label=name)
    right.plot(
        lengths, [case["speedup"] for case in cases], color=_COLORS["triton"], marker="o", label="stem over dense"
    )
    right.annotate(
        f"{cases[-1]['speedup']:.2f}", (lengths[-1], cases[-1]["speedup"]), (8, -3), textcoords="offset points"
    )
    left.set_ylabel("seconds (median; bars: fastest and slowest)")
    right.set_ylabel("times faster than dense")
    left.set_title("time to first token", fontsize=10)
    right.set_title("speed-up of the whole prefill", fontsize=10)
    settings, where = report["settings"], machine.name(report["machine"])
    return f"{report['model']['name']}, {settings['dtype']}, preset {settings['preset']}, {where}"


def _tokens(length: float) -> str:
    if length >= 2**20 and length % 2**20 == 0:
        return f"{int(length) // 2**20}M"
    return f"{int(length) // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{int(length)}"


def _color(name: str) -> str:
    kernel, *extended = name.split()
    return _EXTENDED if extended else _COLORS[kernel]
