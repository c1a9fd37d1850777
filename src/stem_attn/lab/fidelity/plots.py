"""The plots of `stem-attn eval fidelity`: by density, by layer, by position, and the paper's Figures 3 and 5."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from stem_attn.lab import machine
from stem_attn.lab.fidelity.report import Summary, summarize
from stem_attn.lab.results import Record

Found = dict[tuple[str, float | None], Summary]

# Colour-blind safe; a method keeps its colour in every plot of a run.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#17becf", "#bcbd22")
_MARKERS = "osD^vP*Xh<"
_REFERENCES = ("oracle", "dense")  # drawn in black: no method could be used like that


def draw(record: Record) -> dict[str, bytes]:
    """Draw a record.

    Args:
        record: What the command writes as JSON.

    Returns:
        PNG files by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = summarize(record)
    images = {}
    for name, figure in _plots(record, found):
        figure.suptitle(_title(record), fontsize=11)
        image = io.BytesIO()
        figure.savefig(image, dpi=130, format="png")
        _pyplot().close(figure)
        images[f"{name}.png"] = image.getvalue()
    return images


def _plots(record: Record, found: Found) -> Iterator[tuple[str, Any]]:
    names = [name for name in record["methods"] if any(key[0] == name for key in found)]
    yield "by_density", _by_density(names, found)
    for density in record["settings"]["densities"]:
        rows = [found[name, density] for name in names if (name, density) in found]
        if rows:
            yield f"by_layer_{density:g}", _by_layer(names, rows)
            yield f"by_position_{density:g}", _by_position(names, rows)
    tests = record["paper_tests"]
    if "figure3" in tests:
        yield "figure3", _figure3(tests["figure3"], found)
    if "figure5" in tests:
        yield "figure5", _figure5(tests["figure5"], found)


def _by_density(names: list[str], found: Found) -> Any:
    figure, axes = _panels(2, 2, 13, 9)
    measures: tuple[tuple[str, Callable[[Summary], float]], ...] = (
        ("attention output error (geometric mean over layers)", lambda one: one.error),
        ("attention probability lost", lambda one: 1 - one.recall),
        ("KL(dense || sparse), nats", lambda one: one.kl_nats),
        ("positions with another top-1 token", lambda one: 1 - one.top1_agreement),
    )
    for panel, (label, value) in zip(axes.flat, measures, strict=True):
        for name in names:
            points = [(one.density, value(one)) for (method, target), one in found.items() if method == name and target]
            own = [
                (one.density, value(one)) for (method, target), one in found.items() if method == name and not target
            ]
            style = _style(names, name)
            if points:
                panel.plot(*zip(*sorted(points), strict=True), linewidth=1.4, markersize=4, label=name, **style)
            if own and name != "dense":
                alone = {**style, "linestyle": "none", "label": None if points else name}
                panel.plot(*zip(*own, strict=True), **alone, markersize=9, markerfacecolor="none")
        panel.set_xlabel("density (kept over causal blocks)")
        panel.set_title(label, fontsize=10)
        _logarithmic(panel)
    _name_lines(figure, axes.flat[0])
    return figure


def _by_layer(names: list[str], rows: list[Summary]) -> Any:
    figure, axes = _panels(1, 1, 12, 5)
    panel = axes.flat[0]
    for one in rows:
        layers, errors = zip(*one.error_by_layer.items(), strict=True)
        panel.plot(layers, errors, linewidth=1.2, markersize=4, label=one.method, **_style(names, one.method))
    panel.set_xlabel("layer")
    panel.set_title(f"attention output error at density {rows[0].target:g}", fontsize=10)
    _logarithmic(panel)
    _name_lines(figure, panel)
    return figure


def _by_position(names: list[str], rows: list[Summary]) -> Any:
    figure, axes = _panels(1, 2, 14, 5)
    for one in rows:
        style = _style(names, one.method)
        _draw_eighths(axes.flat[0], one.error_by_position, label=one.method, **style)
        _draw_eighths(axes.flat[1], one.kl_by_position, label=one.method, **style)
    axes.flat[0].set_title(f"attention output error, density {rows[0].target:g}", fontsize=10)
    axes.flat[1].set_title(f"KL(dense || sparse), nats, density {rows[0].target:g}", fontsize=10)
    _name_lines(figure, axes.flat[0])
    return figure


def _figure3(test: Record, found: Found) -> Any:
    figure, axes = _panels(1, len(test["densities"]), 6.5 * len(test["densities"]), 5)
    for panel, density in zip(axes.flat, test["densities"], strict=True):
        for i, (label, name) in enumerate(test["methods"]):
            if (name, density) in found:
                one = found[name, density]
                label = f"{label} sparse: {one.kl_nats:.4f}"
                _draw_eighths(panel, one.kl_by_position, label=label, color=_COLORS[i], marker=_MARKERS[i])
        panel.set_title(f"KL by position, nats; density {density:g} over all rows", fontsize=10)
        panel.legend(frameon=False, fontsize=8, title="mean KL")
    return figure


def _figure5(test: Record, found: Found) -> Any:
    figure, axes = _panels(2, 2, 12, 8)
    for column, (parameter, usual) in enumerate((("mu", 0.7), ("beta", 0.2))):
        named = {float(label.split("= ")[1]): name for label, name in test["methods"] if label.startswith(parameter)}
        for i, density in enumerate(test["densities"]):
            points = {x: found[name, density] for x, name in named.items() if (name, density) in found}
            if usual in points:
                base = points[usual]
                style = {"color": _COLORS[i], "marker": _MARKERS[i], "label": f"density {density:g}"}
                axes[0][column].plot(list(points), [one.error / base.error for one in points.values()], **style)
                axes[1][column].plot(list(points), [one.kl_nats / base.kl_nats for one in points.values()], **style)
        axes[0][column].set_title(f"attention output error over that of {parameter} = {usual:g}", fontsize=10)
        axes[1][column].set_title(f"KL over that of {parameter} = {usual:g}", fontsize=10)
        for panel in axes[:, column]:
            panel.set_xlabel(parameter)
            panel.legend(frameon=False, fontsize=8)
    return figure


def _name_lines(figure: Any, panel: Any) -> None:
    """Put a panel's legend beside all panels: many methods would hide their own lines."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)


def _draw_eighths(panel: Any, values: list[float], **style: Any) -> None:
    places = [(i + 0.5) / len(values) for i in range(len(values))]
    panel.plot(places, values, linewidth=1.3, markersize=4, **style)
    panel.set_xlabel("position, as a share of the prompt")
    panel.set_ylim(bottom=0, auto=True)  # auto: lines still to come count too
    panel.set_xlim(0, 1)


def _logarithmic(panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    panel.set_yscale("log")
    plain = FuncFormatter(lambda y, _: f"{y:g}")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter(plain)
    # Few decades have few major ticks.
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if high > 10 * low else (2, 3, 4, 5, 6, 8)))
    panel.yaxis.set_minor_formatter(plain if high < 100 * low else "")


def _style(names: list[str], name: str) -> dict[str, Any]:
    if name in _REFERENCES:
        return {"color": "black", "marker": ".", "linestyle": "--"}
    place = [other for other in names if other not in _REFERENCES].index(name)
    again = place // len(_COLORS)  # the second time round a colour has another marker
    return {
        "color": _COLORS[place % len(_COLORS)],
        "marker": _MARKERS[(place + 3 * again) % len(_MARKERS)],
        "linestyle": "-" if name.startswith("stem") or place < 2 else (0, (5, 1)),
    }


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.grid(color="#dddddd", linewidth=0.6, which="both")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _title(record: Record) -> str:
    settings, model = record["settings"], record["model"]
    count = len(record["texts"])
    return (
        f"{model['name']}, {model['dtype']}, {count} prompt{'s' * (count > 1)} of {settings['length']} tokens, "
        f"block {settings['block_size']}, {machine.name(record['machine'])}"
    )
