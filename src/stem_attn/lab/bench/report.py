"""What a reader sees: tables for the terminal, and rows for a CSV file."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stem_attn.lab import machine
from stem_attn.lab.results import Record

_LEGEND = (
    "ms: median of the rounds. TFLOP/s: on the kept pairs, dense on the causal ones. x NAME: times faster than that "
    "dense kernel. over plain: its time over that without softcap, sinks and fp8. of whole: the selection's share. rms "
    "error: against float64, in units of each row's rms. first s: the first call, compilation included. attention: "
    "over one given selection; whole: selection and attention."
)


def render(report: Record) -> Group:
    """Draw what a terminal shows: the machine, and a table a case or of the whole model."""
    if report["settings"]["kind"] == "ttft":
        return Group(_machine_line(report), _ttft_table(report))
    cases = (part for case in report["cases"] for part in _case(case))
    return Group(_machine_line(report), *cases, Text(_LEGEND, "dim"))


def _case(case: Record) -> list[RenderableType]:
    """Draw one problem's table, and under it what was not timed."""
    dense = [m["name"] for m in case["methods"] if m["part"] == "dense"]
    on_gpu = any(m["peak_extra_mib"] is not None for m in case["methods"])
    beside_plain = any("over_plain" in m for m in case["methods"])
    table = Table(title=_title(case), title_justify="left", header_style="bold")
    table.add_column("method")
    table.add_column("part")
    headers = [
        "ms",
        "min..max",
        "TFLOP/s",
        "% limit",
        *[f"x {name}" for name in dense],
        *(["over plain"] if beside_plain else []),
        "of whole",
        "rms error",
        "first s",
    ]
    for header in [*headers, "host ms", "extra MiB"] if on_gpu else headers:
        table.add_column(header, justify="right")
    for m in case["methods"]:
        ms = m["ms"]
        speedup = m.get("speedup", {})
        cells = [
            _short(ms["median"]),
            f"{_short(ms['min'])}..{_short(ms['max'])}",
            _format(m.get("tflops"), _short),
            _format(m.get("limit_share"), "{:.0%}".format),
            *[_format(speedup.get(name), "{:.2f}".format) for name in dense],
            *([_format(m.get("over_plain"), "{:.3f}".format)] if beside_plain else []),
            _format(m.get("share_of_whole"), "{:.1%}".format),
            _format(m["error"], lambda e: f"{e['rms']:.1e}"),
            f"{m['first_call_s']:.1f}",
        ]
        if on_gpu:
            cells += [_format(m["host_ms"], _short), _format(m["peak_extra_mib"], "{:.0f}".format)]
        table.add_row(m["name"], m["part"], *cells)
    lines: list[RenderableType] = [table]
    limit = f"limit: {_short(case['limit']['tflops'])} TFLOP/s, {case['limit']['name']}"
    if case["gpu_state"]:
        clocks = [s["sm_clock_mhz"] for s in case["gpu_state"]]
        heat = [s["temperature_c"] for s in case["gpu_state"]]
        limit += (
            f"; SM clock {clocks[0]} MHz in the first round, {clocks[-1]} in the last ({min(clocks)}..{max(clocks)}), "
            f"up to {max(heat)} C"
        )
    lines.append(Text(limit, style="dim"))
    for m in case["skipped"]:
        lines.append(Text(f"not measured: {m['name']}: {m['reason']}", style="dim"))
    for m in case["failed"]:
        lines.append(Text(f"FAILED, not timed: {m['name']} {m['part'] or ''}: {m['reason']}", style="bold red"))
    lines.append(Text())
    return lines


def _title(case: Record) -> str:
    queries = "" if case["q_len"] == case["k_len"] else f"last {case['q_len']} of "
    return (
        f"{queries}{case['k_len']} tokens, batch {case['batch']}, {case['heads']}/{case['kv_heads']} heads of "
        f"{case['head_dim']}: density {case['density']:.3f}, ideal speed-up {case['ideal_speedup']:.2f}"
    )


def _machine_line(report: Record) -> str:
    """Name the device, the versions and the settings in one line."""
    settings = report["settings"]
    return f"{machine.in_words(report['machine'])}, {settings['dtype']}, preset {settings['preset']}"


def _ttft_table(report: Record) -> RenderableType:
    """Draw the whole-model table."""
    table = Table(title=f"Prefill of {report['model']['name']}", title_justify="left", header_style="bold")
    headers = ["tokens", "dense s", "stem s", "speed-up", "density", "sparse layers", "dense GiB", "stem GiB"]
    for header in headers:
        table.add_column(header, justify="right")
    for case in report["cases"]:
        dense, stem = case["dense"], case["stem"]
        table.add_row(
            str(case["k_len"]),
            *(f"{_short(x['s']['median'])} ({_short(x['s']['min'])}..{_short(x['s']['max'])})" for x in (dense, stem)),
            f"{case['speedup']:.2f}",
            _format(case["density"], "{:.3f}".format),
            f"{case['sparse_layers']}/{report['model']['layers']}",
            *(_format(x["peak_gib"], "{:.1f}".format) for x in (dense, stem)),
        )
    return table


def csv_rows(report: Record) -> list[Record]:
    """Return one row a measurement."""
    return _ttft_rows(report) if report["settings"]["kind"] == "ttft" else _attention_rows(report)


def _attention_rows(report: Record) -> list[Record]:
    rows = []
    for case in report["cases"]:
        shared = {name: case[name] for name in ("batch", "heads", "kv_heads", "head_dim", "q_len", "k_len", "density")}
        for m in case["methods"]:
            row = {**shared, "method": m["name"], "part": m["part"]}
            row |= {f"ms_{name}": m["ms"][name] for name in ("median", "min", "max")}
            row |= {
                name: m.get(name)
                for name in ("tflops", "limit_share", "over_plain", "share_of_whole", "host_ms", "peak_extra_mib")
            }
            row |= {f"speedup_{name}": ratio for name, ratio in m.get("speedup", {}).items()}
            rows.append(row)
    return rows


def _ttft_rows(report: Record) -> list[Record]:
    return [
        {
            "k_len": case["k_len"],
            "attention": name,
            **{f"s_{key}": case[name]["s"][key] for key in ("median", "min", "max")},
            "peak_gib": case[name]["peak_gib"],
            "speedup": case["speedup"] if name == "stem" else None,
            "density": case["density"] if name == "stem" else None,
        }
        for case in report["cases"]
        for name in ("dense", "stem")
    ]


def _format(value: Any, form: Any) -> str:
    return "" if value is None else str(form(value))


def _short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
