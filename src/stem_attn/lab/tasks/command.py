"""`stem-attn eval tasks` and `eval ruler`: long-context tasks under dense attention and sparse methods."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.devices import check_dtype
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
from stem_attn.lab.results import Record, check_outputs, deliver, new_record

if TYPE_CHECKING:
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.tasks.run import Results, Settings

_TEMPLATES = ("auto", "base", "chat")

TasksOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="Names of tasks or of groups: exact, RULER's tasks whose prompts are NVIDIA's; ruler, with essay tasks on "
        "another text; retrieval; code; all.",
        rich_help_panel=PROMPT,
    ),
]


def _command(name: str, default_tasks: str, summary: str) -> Callable[..., None]:
    """Return the command of a name, with a default for `--tasks`."""

    def run(
        model: ModelOption = None,
        gguf: GgufOption = None,
        device: DeviceOption = "auto",
        dtype: DtypeOption = "auto",
        tasks: TasksOption = default_tasks,
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
                help="base: plain text; chat: the model's chat format, but for code; auto: chat if the model has one.",
                rich_help_panel=PROMPT,
            ),
        ] = "auto",
        methods: Annotated[
            str,
            typer.Option(
                metavar="NAME,...",
                help="stem-PRESET, a rival's name, one of these with +tail (the prompt's last rows then keep what "
                "the default's tail keeps), or a variant's. Dense attention always runs too.",
                rich_help_panel=METHOD,
            ),
        ] = "stem-default",
        variant: VariantOption = None,
        block_size: Annotated[
            int,
            typer.Option(metavar="N", help="Tokens a block, of methods that do not set it.", rich_help_panel=METHOD),
        ] = 128,
        density: Annotated[
            float | None,
            typer.Option(
                min=0.0,
                max=1.0,
                metavar="D",
                help="Bring every method, in every layer, to this share of the causal blocks; Stem, whose budget is "
                "whole blocks, just below it. Default: each method's own budget.",
                rich_help_panel=METHOD,
            ),
        ] = None,
        part: Annotated[
            str,
            typer.Option(
                metavar="I/N",
                help="Run every N-th sample from the I-th on, so that N processes share the work; each with its own "
                "--out, and `stem-attn eval report` joins them.",
                rich_help_panel=OUTPUT,
            ),
        ] = "1/1",
        minutes: Annotated[
            float | None,
            typer.Option(
                min=0.0,
                metavar="M",
                help="Begin no prompt later than this after the start; the tables show what there is.",
                rich_help_panel=OUTPUT,
            ),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="Keep every answer here, one JSON line each. A run finds there what is done already, so it can "
                "be interrupted, and extended by samples, lengths, tasks and methods.",
                rich_help_panel=OUTPUT,
            ),
        ] = None,
        json_path: JsonOption = None,
    ) -> None:
        started = time.monotonic()
        require("transformers", "gguf", "wonderwords", extra="eval")
        from stem_attn.lab.can_attend import check_can_attend
        from stem_attn.lab.named_methods import NamedMethod, parse_methods
        from stem_attn.lab.progress import show_progress
        from stem_attn.lab.tasks.report import render
        from stem_attn.lab.tasks.run import Settings, evaluate
        from stem_attn.lab.tasks.store import Store

        # Everything that can be refused without the model is refused before it loads.
        check_dtype(dtype)
        if template not in _TEMPLATES:
            raise InputError(f"--template must be one of {', '.join(_TEMPLATES)}; got {template!r}")
        given = parse_methods(methods, variant or [])
        if not given:
            raise InputError("nothing to measure: name some --methods or a --variant")
        sparse = [named for named in given if named.base != "dense"]
        settings = Settings(
            tasks=_tasks(tasks),
            lengths=tuple(sorted(set(whole_numbers("--lengths", lengths)))),
            samples=_part(part, samples),
            methods=(NamedMethod("dense", "dense"), *sparse),
            block_size=block_size,
            density=density,
            chat=template == "chat",
            seed=seed,
        )
        for named in settings.methods:
            named.build(block_size)
            if density is not None and named.fields.get("layer_budgets"):
                raise InputError(f"method {named.name}: budgets by layer have no one --density; leave it out")
        check_outputs(json_path, inputs=[out])
        store = Store(out)
        loaded = load_model(model, gguf, device, dtype)
        check_can_attend(loaded.model, *(named.build(block_size) for named in settings.methods))
        if max(settings.lengths) > loaded.context_tokens:
            raise InputError(
                f"--lengths {max(settings.lengths)} is more than the model's context of {loaded.context_tokens} tokens"
            )
        if template == "auto":
            settings = dataclasses.replace(settings, chat=loaded.tokenizer.chat_template is not None)
        elif settings.chat and loaded.tokenizer.chat_template is None:
            raise InputError(f"--template chat: the tokenizer of {loaded.name} has no chat template")

        def stop() -> bool:
            return minutes is not None and time.monotonic() - started > 60 * minutes

        total = len(settings.tasks) * len(settings.lengths) * len(settings.methods) * len(settings.samples)
        with show_progress(name, "prompts", total) as progress:
            results = evaluate(loaded, settings, store, progress.finishes, stop)
        if not results.records:
            raise InputError("no prompt was answered: give --minutes more, or fewer --samples a --part")
        found = _record(name, loaded, settings, results)
        deliver(found, render(found), json_path)

    run.__name__ = name
    run.__doc__ = (
        f"{summary}\n\nThe prompts are made here, without a network, and are the same for every method. Answers are "
        "decoded greedily with dense attention over what the method's prefill left."
    )
    return run


def _tasks(text: str) -> tuple[str, ...]:
    from stem_attn.lab.tasks.registry import GROUPS, TASKS

    names = [name for given in listed(text) for name in GROUPS.get(given, (given,))]
    for name in names:
        if name in ("qa_1", "qa_2"):
            raise InputError(f"task {name} is not offered: its questions are in a data set that must be downloaded")
        if name not in TASKS:
            raise InputError(f"unknown task {name!r}; known: {', '.join((*GROUPS, *TASKS))}")
    if not names:
        raise InputError("--tasks names no task")
    return tuple(dict.fromkeys(names))


def _part(text: str, samples: int) -> tuple[int, ...]:
    """Return the numbers of the samples that a process runs."""
    first, slash, step = text.partition("/")
    if not (slash and first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise InputError(f"--part takes I/N with I from 1 to N, such as 2/4; got {text!r}")
    return tuple(range(int(first) - 1, samples, int(step)))


def _record(command: str, loaded: LoadedModel, settings: Settings, results: Results) -> Record:
    """Return every number and setting as plain values."""
    from stem_attn.lab.tasks.summary import summarize

    return {
        **new_record(command, dataclasses.asdict(settings), loaded.model.device),
        **summarize(results.records),
        "left_out": [
            {"method": method, "length": length, "reason": reason}
            for (method, length), reason in results.left_out.items()
        ],
        "stopped": results.stopped,
    }


ruler = _command(
    "ruler",
    "exact",
    "Score RULER's long-context tasks with dense attention and with sparse prefill. Its two question-answering tasks "
    "are not offered: they need data sets to download.",
)
tasks = _command(
    "tasks", "all", "Score RULER's tasks, retrieval and code completion with dense attention and with sparse prefill."
)
