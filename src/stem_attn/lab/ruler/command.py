"""`stem-attn eval ruler`: RULER's tasks under dense attention and sparse methods, on the same prompts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.devices import check_dtype, name_of
from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import (
    METHOD,
    OUTPUT,
    PROMPT,
    DeviceOption,
    DtypeOption,
    GgufOption,
    JsonOption,
    ModelOption,
    SeedOption,
    VariantOption,
    listed,
    load_model,
    whole_numbers,
)
from stem_attn.lab.results import Record, check_json, deliver, new_record

if TYPE_CHECKING:
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.ruler.run import Results, Settings

_TEMPLATES = ("auto", "base", "chat")


def ruler(
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Task names; or exact: those whose prompts are NVIDIA's; or all, with essay tasks on another text.",
            rich_help_panel=PROMPT,
        ),
    ] = "exact",
    lengths: Annotated[
        str,
        typer.Option(metavar="N,...", help="Tokens of prompt and answer together.", rich_help_panel=PROMPT),
    ] = "4096",
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts of each task and length.", rich_help_panel=PROMPT)
    ] = 10,
    seed: SeedOption = 42,
    template: Annotated[
        str,
        typer.Option(
            help="base: plain text; chat: the model's chat format; auto: chat if the model has one.",
            rich_help_panel=PROMPT,
        ),
    ] = "auto",
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="dense, stem-PRESET, a rival's name, or a variant's.",
            rich_help_panel=METHOD,
        ),
    ] = "dense,stem-default",
    variant: VariantOption = None,
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens a block, of methods that do not set it.", rich_help_panel=METHOD)
    ] = 128,
    density: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="D",
            help="Bring every method, in every layer, to this share of the causal blocks; Stem, whose budget is whole "
            "blocks, just below it. Default: each method's own budget.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep every answer here, one JSON line each. A run finds there what is done already, so it can be "
            "interrupted, and extended by samples, lengths, tasks and methods.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Score RULER's long-context tasks with dense attention and with sparse prefill, on the same prompts.

    The prompts are made here, without a network. Answers are decoded greedily with dense attention over what the
    method's prefill left. RULER's two question-answering tasks are not offered: they need data sets to download.
    """
    require("transformers", "gguf", "wonderwords", extra="eval")
    from stem_attn.lab.named_methods import parse_methods
    from stem_attn.lab.progress import show_progress
    from stem_attn.lab.ruler.report import render
    from stem_attn.lab.ruler.run import Settings, evaluate
    from stem_attn.lab.ruler.store import Store

    # Everything that can be refused without the model is refused before it loads.
    check_dtype(dtype)
    if template not in _TEMPLATES:
        raise InputError(f"--template must be one of {', '.join(_TEMPLATES)}; got {template!r}")
    settings = Settings(
        tasks=_tasks(tasks),
        lengths=tuple(sorted(set(whole_numbers("--lengths", lengths)))),
        samples=samples,
        methods=tuple(parse_methods(methods, variant or [])),
        block_size=block_size,
        density=density,
        chat=template == "chat",
        seed=seed,
    )
    if not settings.methods:
        raise InputError("nothing to measure: name some --methods or a --variant")
    for named in settings.methods:
        named.build(block_size)
        if density is not None and named.fields.get("layer_budgets"):
            raise InputError(f"method {named.name}: budgets by layer have no one --density; leave it out")
    check_json(json_path)
    store = Store(out)
    loaded = load_model(model, gguf, device, dtype)
    if max(settings.lengths) > loaded.context_tokens:
        raise InputError(
            f"--lengths {max(settings.lengths)} is more than the model's context of {loaded.context_tokens} tokens"
        )
    if template == "auto":
        settings = dataclasses.replace(settings, chat=loaded.tokenizer.chat_template is not None)
    elif settings.chat and loaded.tokenizer.chat_template is None:
        raise InputError(f"--template chat: the tokenizer of {loaded.name} has no chat template")

    total = len(settings.tasks) * len(settings.lengths) * len(settings.methods) * settings.samples
    with show_progress("ruler", "prompts", total) as progress:
        results = evaluate(loaded, settings, store, progress.finishes)
    found = _record(loaded, settings, results)
    deliver(found, render(found), json_path)


def _tasks(text: str) -> tuple[str, ...]:
    from stem_attn.lab.ruler.tasks import EXACT, TASKS

    groups = {"exact": EXACT, "all": tuple(TASKS)}
    names = [name for given in listed(text) for name in groups.get(given, (given,))]
    for name in names:
        if name in ("qa_1", "qa_2"):
            raise InputError(f"task {name} is not offered: its questions are in a data set that must be downloaded")
        if name not in TASKS:
            raise InputError(f"unknown task {name!r}; known: exact, all, {', '.join(TASKS)}")
    if not names:
        raise InputError("--tasks names no task")
    return tuple(dict.fromkeys(names))


def _record(loaded: LoadedModel, settings: Settings, results: Results) -> Record:
    """Return every number and setting as plain values."""
    from stem_attn.lab.prompts import public_text
    from stem_attn.lab.ruler.run import fingerprint
    from stem_attn.lab.ruler.summary import summarize
    from stem_attn.lab.ruler.tasks import TASKS

    return {
        **new_record("ruler", dataclasses.asdict(settings), loaded.model.device),
        "model": loaded.name,
        "weights": fingerprint(loaded.model),
        "dtype": name_of(loaded.model.dtype),
        "essays": public_text()[1] if any(TASKS[task].essays for task in settings.tasks) else None,
        **summarize(results.records, [named.name for named in settings.methods]),
        "layers": _layers(results.records),
        "left_out": [
            {"method": method, "length": length, "reason": reason}
            for (method, length), reason in results.left_out.items()
        ],
    }


def _layers(records: list[Record]) -> list[Record]:
    """Return, for every method and length, a prompt's layers by what they were."""
    found: dict[tuple[str, int], Counter[str]] = {}
    prompts: Counter[tuple[str, int]] = Counter()
    for record in records:
        place = (record["method"], record["length"])
        found.setdefault(place, Counter()).update(record["layers"])
        prompts[place] += 1
    return [
        {
            "method": place[0],
            "length": place[1],
            "layers": {kind: total / prompts[place] for kind, total in counts.items()},
        }
        for place, counts in found.items()
    ]
