"""`stem-attn bench`: options in, tables and files out."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import CONFIG_HELP, config_from_options

if TYPE_CHECKING:
    import torch

    from stem_attn.config import StemConfig
    from stem_attn.lab.bench.shapes import Shape

Record = dict[str, Any]
_ROUNDS = {"attention": 10, "ttft": 3}


def bench(
    shape: Annotated[
        str, typer.Option(help="Heads of one layer: llama3-8b, qwen3-8b (32/8 heads of 128) or smollm2 (9/3 of 64).")
    ] = "llama3-8b",
    heads: Annotated[int | None, typer.Option(help="Query heads, instead of the shape's.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads, instead of the shape's.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Numbers a head, instead of the shape's.")] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "8192,16384",
    q_len: Annotated[
        int | None, typer.Option(help="Measure a chunk: the last tokens of the prompt over the whole of it.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts a call.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")] = None,
    preset: Annotated[str, typer.Option(help="Settings of the method: default, official or paper.")] = "default",
    config_file: Annotated[Path | None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP)] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a setting; may be repeated.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas. Default: all, of sdpa, fa2, cudnn, fa4-dense (dense); flex; and the "
            "package's backends fa4, triton, cpu: attention, selection and the whole operation of each."
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Rounds; every method is timed once a round. Default: 10, with --ttft 3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs and of the rows that are checked.")] = 0,
    ttft: Annotated[
        bool, typer.Option("--ttft", help="Time the prefill of a whole model with random weights instead.")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="With --ttft: decoder layers, instead of the model's.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number and setting.")
    ] = None,
    csv_path: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write one line a measurement.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a PNG plot (needs matplotlib).")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write bench.json, bench.csv, bench.png and bench.txt there.")
    ] = None,
) -> None:
    """Measure attention by method and length: correctness first, then medians of alternating runs.

    Every method is checked against float64 on sampled rows, and one that is wrong is not timed. On a GPU the L2 cache
    is flushed before each call and the SM clock is read in every round. Exit code 1 if a method failed.
    """
    from stem_attn.lab import machine
    from stem_attn.lab.bench.gate import GateError
    from stem_attn.lab.bench.shapes import DTYPES

    config = config_from_options(preset, override or [], config_file)
    if config.layer_budgets and not ttft:
        raise InputError(
            "the config has budgets by layer, and without --ttft one layer is measured: give it a budget with "
            "--set layer_budgets=[] --set budget_scale=FACTOR"
        )
    where = _device(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = "ttft" if ttft else "attention"
    only_attention = {
        "--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim, "--q-len": q_len, "--methods": methods
    }  # fmt: skip
    for option, value in only_attention.items() if ttft else {"--layers": layers}.items():
        if value is not None:
            raise InputError(f"{option} has no meaning {'with' if ttft else 'without'} --ttft")
    settings: Record = {
        "shape": shape,
        "lengths": _lengths(lengths),
        "batch": _positive("--batch", batch),
        "dtype": dtype,
        "device": str(where),
        "preset": preset,
        "config": json.loads(config.to_json()),
        "repeats": _positive("--repeats", _ROUNDS[kind] if repeats is None else repeats),
        "seed": seed,
    }
    report: Record = {
        "command": kind,
        "arguments": shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "machine": machine.describe(where),
        "settings": settings,
        "cases": [],
    }
    files = _files(out, json_path, csv_path, plot)
    if ttft:
        cases = _ttft_cases(report, config, where, layers)
    else:
        settings |= {
            "heads": dataclasses.asdict(_shape(shape, heads, kv_heads, head_dim)),
            "q_len": q_len,
            "methods": _methods(methods),
        }
        cases = _attention_cases(report, config, where)
    try:
        for case in cases:
            report["cases"].append(case)
            _write(report, {kind: files[kind] for kind in ("json", "csv") if kind in files})  # a long run may be cut
    except GateError as error:
        _say(f"stem-attn: error: {error}")
        raise typer.Exit(1) from error
    _show(report)
    _write(report, files)
    if any(case.get("failed") for case in report["cases"]):
        raise typer.Exit(1)


def _attention_cases(report: Record, config: StemConfig, device: torch.device) -> Iterator[Record]:
    from stem_attn.lab.bench.run import run_case
    from stem_attn.lab.bench.shapes import DTYPES, Case, Shape

    s = report["settings"]
    for length in s["lengths"]:
        q_len = s["q_len"] or length
        if not 1 <= q_len <= length:
            raise InputError(f"--q-len must be from 1 to the length {length}, got {q_len}")
    for length in s["lengths"]:
        case = Case(Shape(**s["heads"]), s["batch"], s["q_len"] or length, length, DTYPES[s["dtype"]], device)
        yield run_case(case, config, s["methods"], rounds=s["repeats"], seed=s["seed"], say=_say)


def _ttft_cases(report: Record, config: StemConfig, device: torch.device, layers: int | None) -> Iterator[Record]:
    from stem_attn.lab.bench import ttft
    from stem_attn.lab.bench.shapes import DTYPES

    s = report["settings"]
    if layers is not None:
        _positive("--layers", layers)
    _say("building the model")
    model = ttft.build_model(s["shape"], layers, max(s["lengths"]), DTYPES[s["dtype"]], device, s["seed"])
    report["model"] = {"name": model.name, "layers": model.layers}
    if len(config.layer_budgets) not in (0, model.layers):
        raise InputError(
            f"layer_budgets has {len(config.layer_budgets)} factors, and the model has {model.layers} layers"
        )
    report["check"] = ttft.check_adapter(model, config, s["seed"])
    for length in s["lengths"]:
        yield ttft.measure(model, config, length, batch=s["batch"], rounds=s["repeats"], seed=s["seed"], say=_say)


def _show(report: Record) -> None:
    from rich.console import Console

    from stem_attn.lab.bench.report import render

    # Piped output has no width of its own; 80 letters would cut the columns.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for part in render(report):
        console.print(part)


def _write(report: Record, files: dict[str, Path]) -> None:
    from stem_attn.lab.bench import plot
    from stem_attn.lab.bench import report as writers

    write = {
        "json": writers.write_json,
        "csv": writers.write_csv,
        "txt": writers.write_text,
        "png": plot.write_plot,
    }
    for kind, path in files.items():
        write[kind](report, path)


def _files(out: Path | None, json_path: Path | None, csv_path: Path | None, plot: Path | None) -> dict[str, Path]:
    """Find out before any work whether the files asked for can be written."""
    files = {"json": json_path, "csv": csv_path, "png": plot}
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: {error.strerror}") from error
        files = {kind: files.get(kind) or out / f"bench.{kind}" for kind in ("json", "csv", "png", "txt")}
    wanted = {kind: path for kind, path in files.items() if path is not None}
    for path in wanted.values():
        if not path.parent.is_dir() or path.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist, or it is a folder")
    if "png" in wanted:
        require("matplotlib", extra="bench")
    return wanted


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be like cpu, cuda or cuda:1, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the benchmark runs on cpu and cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _lengths(text: str) -> list[int]:
    try:
        return [_positive("--lengths", int(item)) for item in text.split(",")]
    except ValueError as error:
        raise InputError(f"--lengths takes positive numbers of tokens separated by commas, got {text!r}") from error


def _shape(name: str, heads: int | None, kv_heads: int | None, head_dim: int | None) -> Shape:
    from stem_attn.lab.bench.shapes import SHAPES, Shape

    if name not in SHAPES:
        raise InputError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}")
    named = SHAPES[name]
    shape = Shape(heads or named.heads, kv_heads or named.kv_heads, head_dim or named.head_dim)
    for option, value in (("--heads", heads), ("--kv-heads", kv_heads), ("--head-dim", head_dim)):
        if value is not None:
            _positive(option, value)
    if shape.heads % shape.kv_heads:
        raise InputError(f"query heads must be a multiple of KV heads, got {shape.heads} and {shape.kv_heads}")
    return shape


def _methods(text: str | None) -> list[str]:
    from stem_attn.lab.bench.contenders import names

    known = names()
    chosen = known if text is None else [item.strip() for item in text.split(",")]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"unknown method {', '.join(unknown)}; known: {', '.join(known)}")
    return list(dict.fromkeys(chosen))


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{option} must be at least 1, got {value}")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
