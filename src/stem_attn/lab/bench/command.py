"""`stem-attn bench`: options in, tables and files out."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.configs import plain_settings, settings_from_options
from stem_attn.lab.devices import DTYPES, name_of, pick_device, pick_dtype
from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import (
    METHOD,
    OUTPUT,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PresetOption,
    SeedOption,
    SetOption,
    listed,
    whole_numbers,
)
from stem_attn.lab.results import (
    Record,
    check_folder,
    check_writable,
    new_record,
    print_text,
    show,
    to_csv,
    to_json,
    to_text,
    write_files,
)
from stem_attn.lab.shapes import MODELS, SHAPES, Shape

if TYPE_CHECKING:
    import torch

    from stem_attn.config import StemConfig
    from stem_attn.lab.progress import OnStep
    from stem_attn.policy import PrefillPolicy

_ROUNDS = {"attention": 10, "ttft": 3}
_PROBLEM = "Problem"


def bench(
    shape: Annotated[
        str,
        typer.Option(
            help="Heads of one layer: llama3-8b, qwen3-8b (32/8 heads of 128) or smollm2 (9/3 of 64).",
            rich_help_panel=_PROBLEM,
        ),
    ] = "llama3-8b",
    heads: Annotated[
        int | None, typer.Option(min=1, help="Query heads, instead of the shape's.", rich_help_panel=_PROBLEM)
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="KV heads, instead of the shape's.", rich_help_panel=_PROBLEM)
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(min=1, help="Numbers a head, instead of the shape's.", rich_help_panel=_PROBLEM)
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, separated by commas.", rich_help_panel=_PROBLEM)
    ] = "8192,16384",
    q_len: Annotated[
        int | None,
        typer.Option(
            help="Measure a chunk: the last tokens of the prompt over the whole of it.", rich_help_panel=_PROBLEM
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts a call.", rich_help_panel=_PROBLEM)] = 1,
    softcap: Annotated[
        float | None,
        typer.Option(help="Measure the package's backends with this softcap too.", rich_help_panel=_PROBLEM),
    ] = None,
    sinks: Annotated[
        bool,
        typer.Option("--sinks", help="Measure the package's backends with sinks too.", rich_help_panel=_PROBLEM),
    ] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    preset: PresetOption = "default",
    config_file: ConfigOption = None,
    override: SetOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="What to time, separated by commas. Default: all, of sdpa, fa2, cudnn, fa4-dense (dense); flex; and "
            "the package's backends fa4, triton, cpu: attention, selection and the whole operation of each.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds; everything is timed once a round. Default: 10, with --ttft 3."),
    ] = None,
    ttft: Annotated[
        bool, typer.Option("--ttft", help="Time the prefill of a whole model with random weights instead.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="With --ttft: decoder layers, instead of the model's.")
    ] = None,
    json_path: JsonOption = None,
    csv_path: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write one line a measurement.", rich_help_panel=OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a PNG plot (needs matplotlib).", rich_help_panel=OUTPUT)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write bench.json, bench.csv, bench.png and bench.txt there.", rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Measure attention by kernel and length: correctness first, then medians of alternating runs.

    Everything is checked against float64 on sampled rows, and what is wrong is not timed. On a GPU the L2 cache is
    flushed before each call and the SM clock is read in every round. Exit code 1 if something failed.
    """
    from stem_attn.lab.bench.report import render
    from stem_attn.lab.gate import GateError
    from stem_attn.lab.progress import show_progress

    config, policy = settings_from_options(preset, override or [], config_file)
    if policy.layer_budgets and not ttft:
        raise InputError(
            "the config has budgets by layer, and without --ttft one layer is measured: give it a budget with "
            "--set layer_budgets=[] --set budget_scale=FACTOR"
        )
    if config.residual != "none" and not ttft:
        raise InputError(
            f"the benchmark checks and times attention over the kept blocks: take --set residual=none, not "
            f"{config.residual}"
        )
    where = pick_device(device)
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"--device: the benchmark runs on cpu and cuda, got {device!r}")
    kind = "ttft" if ttft else "attention"
    only_attention = {
        "--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim, "--q-len": q_len, "--methods": methods,
        "--softcap": softcap, "--sinks": sinks or None,
    }  # fmt: skip
    for option, value in only_attention.items() if ttft else {"--layers": layers}.items():
        if value is not None:
            raise InputError(f"{option} has no meaning {'with' if ttft else 'without'} --ttft")
    settings: Record = {
        "kind": kind,
        "shape": shape,
        "lengths": whole_numbers("--lengths", lengths),
        "batch": batch,
        "dtype": name_of(pick_dtype(dtype, where)),
        "device": str(where),
        "preset": preset,
        "config": plain_settings(config, policy),
        "repeats": repeats or _ROUNDS[kind],
        "seed": seed,
    }
    if ttft:
        require("transformers", extra="bench")
        if shape not in MODELS:
            raise InputError(f"--ttft needs a model's shape: {', '.join(MODELS)}; got {shape!r}")
    else:
        settings |= {
            "heads": dataclasses.asdict(_shape(shape, heads, kv_heads, head_dim)),
            "q_len": q_len,
            "methods": _contenders(methods),
            "softcap": softcap,
            "sinks": sinks,
        }
        if softcap is not None and not 0 < softcap < math.inf:
            raise InputError(f"--softcap must be a finite number above 0, got {softcap}")
        for length in settings["lengths"]:
            if q_len is not None and not 1 <= q_len <= length:
                raise InputError(f"--q-len must be from 1 to the length {length}, got {q_len}")
    files = _files(out, json_path, csv_path, plot)
    report = {**new_record("bench", settings, where), "cases": []}
    try:
        with show_progress("bench", "steps", _steps(settings)) as progress:
            on_step = progress.starts
            cases = (
                _ttft_cases(report, config, policy, where, layers, on_step)
                if ttft
                else _attention_cases(report, config, where, on_step)
            )
            for case in cases:
                report["cases"].append(case)
                # A long run may be cut.
                _write(report, {kind: files[kind] for kind in ("json", "csv") if kind in files})
    except GateError as error:
        print(f"stem-attn: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    show(render(report), stderr=json_path == "-")
    _write(report, files)
    if json_path == "-":
        print_text(to_json(report))
    if any(case.get("failed") for case in report["cases"]):
        raise typer.Exit(1)


def _steps(settings: Record) -> int:
    """Count what starts: a contender's check or a round of timing, or a model and its prefills."""
    cases, rounds = len(settings["lengths"]), int(settings["repeats"])
    if settings["kind"] == "ttft":
        return 1 + cases * 2 * (rounds + 1)
    return cases * (len(settings["methods"]) + rounds)


def _attention_cases(report: Record, config: StemConfig, device: torch.device, on_step: OnStep) -> Iterator[Record]:
    from stem_attn.lab.bench.cases import Case
    from stem_attn.lab.bench.run import run_case

    s = report["settings"]
    for length in s["lengths"]:
        case = Case(Shape(**s["heads"]), s["batch"], s["q_len"] or length, length, DTYPES[s["dtype"]], device)
        how = {"softcap": s["softcap"], "sinks": s["sinks"]}
        yield run_case(case, config, s["methods"], rounds=s["repeats"], seed=s["seed"], on_step=on_step, **how)


def _ttft_cases(
    report: Record,
    config: StemConfig,
    policy: PrefillPolicy,
    device: torch.device,
    layers: int | None,
    on_step: OnStep,
) -> Iterator[Record]:
    from stem_attn.lab.bench import ttft
    from stem_attn.lab.can_attend import check_can_attend

    s = report["settings"]
    on_step("building the model")
    model = ttft.build_model(s["shape"], layers, max(s["lengths"]), DTYPES[s["dtype"]], device, s["seed"])
    report["model"] = {"name": model.name, "layers": model.layers}
    try:
        policy.check_layers(model.layers)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_can_attend(model.module, config)
    report["check"] = ttft.check_adapter(model, config, s["seed"])
    for length in s["lengths"]:
        yield ttft.measure(
            model, config, policy, length, batch=s["batch"], rounds=s["repeats"], seed=s["seed"], on_step=on_step
        )


def _files(out: Path | None, json_path: str | None, csv_path: Path | None, plot: Path | None) -> dict[str, Path]:
    """Return the files asked for by what they hold; find out before any work whether they can be written."""
    files = {"json": None if json_path in (None, "-") else Path(str(json_path)), "csv": csv_path, "png": plot}
    if out is not None:
        files = {kind: files.get(kind) or out / f"bench.{kind}" for kind in ("json", "csv", "png", "txt")}
    wanted = {kind: path for kind, path in files.items() if path is not None}
    if "png" in wanted:
        require("matplotlib", extra="bench")
    if out is None:
        check_writable(*wanted.values())
    else:
        check_folder(out, *wanted.values())
    return wanted


def _write(report: Record, files: dict[str, Path]) -> None:
    from stem_attn.lab.bench.plot import draw
    from stem_attn.lab.bench.report import csv_rows, render

    def content(kind: str) -> str | bytes:
        if kind == "png":
            return draw(report)
        if kind == "txt":
            return to_text(render(report))
        return to_json(report) if kind == "json" else to_csv(csv_rows(report))

    write_files({path: content(kind) for kind, path in files.items()})


def _shape(name: str, heads: int | None, kv_heads: int | None, head_dim: int | None) -> Shape:
    if name not in SHAPES:
        raise InputError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}")
    named = SHAPES[name]
    shape = Shape(heads or named.heads, kv_heads or named.kv_heads, head_dim or named.head_dim)
    if shape.heads % shape.kv_heads:
        raise InputError(f"query heads must be a multiple of KV heads, got {shape.heads} and {shape.kv_heads}")
    return shape


def _contenders(text: str | None) -> list[str]:
    from stem_attn.lab.bench.contenders import names

    known = names()
    chosen = known if text is None else listed(text)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise InputError(f"--methods: unknown method {', '.join(unknown) or '(none)'}; known: {', '.join(known)}")
    return list(dict.fromkeys(chosen))
