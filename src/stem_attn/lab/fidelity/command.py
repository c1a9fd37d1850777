"""`stem-attn eval fidelity`: what each method of sparse attention costs in fidelity, at equal density, on real text."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
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
    LengthOption,
    LogitStrideOption,
    ModelOption,
    TextFileOption,
    VariantOption,
    densities,
    listed,
    load_model,
)
from stem_attn.lab.results import Record, check_folder, new_record, show, write_files

if TYPE_CHECKING:
    from stem_attn.lab.fidelity.paper_tests import PaperTest
    from stem_attn.lab.fidelity.run import Candidate, Found
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.named_methods import NamedMethod
    from stem_attn.lab.texts import Excerpt

_SEED = 0


def fidelity(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Where fidelity.json, fidelity.md, layers.csv, propagated.csv and the plots go.",
            rich_help_panel=OUTPUT,
        ),
    ],
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    length: LengthOption = 8192,
    prompts: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Independent prompts, of the documents in turn.", rich_help_panel=PROMPT),
    ] = 3,
    text_file: TextFileOption = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="stem-official, stem-default, stem-paper, and Stem's rivals. Compared at every density.",
            rich_help_panel=METHOD,
        ),
    ] = "stem-official,stem-default,uniform,xattention,flexprefill,minference,flashprefill,a_shape,oracle,dense",
    variant: VariantOption = None,
    published: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Methods and variants measured as published too, at whatever density their settings give.",
            rich_help_panel=METHOD,
        ),
    ] = "",
    wanted: Annotated[
        str,
        typer.Option(
            "--densities",
            metavar="D,D,...",
            help="Kept over causal blocks, forced blocks included; the same in every layer.",
            rich_help_panel=METHOD,
        ),
    ] = "0.12,0.22",
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens a block, of every method.", rich_help_panel=METHOD)
    ] = 32,
    paper_tests: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The paper's tests to run as well: table1, table5, figure3, figure5.",
            rich_help_panel=METHOD,
        ),
    ] = "",
    logit_stride: LogitStrideOption = 1,
) -> None:
    """Measure attention error, attention recall, KL and top-1 agreement of sparse attention at equal density.

    Every method selects blocks; all attend through the same backends. Attention errors are taken layer by layer on the
    q, k, v of a dense forward, predictions from a forward in which every full attention layer is sparse. Sliding-window
    layers stay exact.
    """
    require("transformers", "gguf", "matplotlib", extra="eval")
    from stem_attn.lab.can_attend import check_can_attend
    from stem_attn.lab.named_methods import parse_methods

    # Everything that can be refused without the model is refused before it loads.
    check_dtype(dtype)
    compared = parse_methods(methods, variant or [])
    own = {named.name: named for named in compared}
    as_published = [own[name] if name in own else parse_methods(name)[0] for name in listed(published)]
    shares = densities("--densities", wanted)
    tests = _paper_tests(paper_tests)
    candidates = _candidates(compared, as_published, shares, tests, block_size)
    check_folder(out, out / "fidelity.json")

    import torch

    from stem_attn.lab.fidelity.files import contents
    from stem_attn.lab.fidelity.report import render
    from stem_attn.lab.fidelity.run import Found, measure_prompt
    from stem_attn.lab.progress import show_progress
    from stem_attn.lab.texts import excerpts

    torch.manual_seed(_SEED)
    loaded = load_model(model, gguf, device, dtype)
    check_can_attend(loaded.model, *(candidate.named.build(block_size) for candidate in candidates))
    if length > loaded.context_tokens:
        raise InputError(f"--length {length} is more than the model's context of {loaded.context_tokens} tokens")
    for candidate in candidates:
        candidate.named.check_layers(loaded.model.config.get_text_config().num_hidden_layers)
    texts = excerpts(loaded.tokenizer, length, prompts, text_file or [])
    found = Found()
    settings: Record = {
        "length": length,
        "block_size": block_size,
        "densities": shares,
        "logit_stride": logit_stride,
        "seed": _SEED,
        "seconds_by_prompt": [],
    }
    layers = loaded.model.config.get_text_config().num_hidden_layers
    with show_progress("fidelity", "steps", len(texts) * (layers + len(candidates)), at_most=True) as progress:
        for number, text in enumerate(texts):
            name, start = f"prompt {number + 1}/{len(texts)}", time.perf_counter()
            measure_prompt(
                loaded.model,
                text.ids,
                found.left(candidates),
                prompt=number,
                block_size=block_size,
                logit_stride=logit_stride,
                on_step=lambda step, name=name: progress.starts(f"{name}, {step}"),  # type: ignore[misc]
                found=found,
            )
            settings["seconds_by_prompt"].append(round(time.perf_counter() - start, 1))
            # A run that is cut off leaves the prompts that it has done.
            record = _record(loaded, settings, texts[: number + 1], compared, as_published, tests, found)
            files = contents(record)
            write_files({out / name: content for name, content in files.items()})
            print(f"{name}: {len(found.left(candidates))} cases, written to {out}", file=sys.stderr, flush=True)
    show(render(record, str(out / "fidelity.md")))


def _candidates(
    compared: Sequence[NamedMethod],
    as_published: Sequence[NamedMethod],
    shares: Sequence[float],
    tests: dict[str, PaperTest],
    block_size: int,
) -> list[Candidate]:
    """Return everything to measure, each once; refuse methods that cannot be built."""
    from stem_attn.lab.fidelity.run import Candidate

    candidates = [Candidate(named, density) for named in compared for density in shares if not named.density_is_its_own]
    # Dense shows what rounding alone makes of the numbers.
    candidates += [
        Candidate(named, None) for named in (*as_published, *(named for named in compared if named.density_is_its_own))
    ]
    for test in tests.values():
        candidates += [Candidate(named, density) for _, named in test.methods for density in test.densities or shares]
    for candidate in candidates:
        candidate.named.build(block_size)
    if not candidates:
        raise InputError("nothing to measure: name some --methods, a --variant or --paper-tests")
    return list(dict.fromkeys(candidates))


def _record(
    loaded: LoadedModel,
    settings: Record,
    texts: Sequence[Excerpt],
    compared: Sequence[NamedMethod],
    as_published: Sequence[NamedMethod],
    tests: dict[str, PaperTest],
    found: Found,
) -> Record:
    config = loaded.model.config.get_text_config()
    variants = [named for test in tests.values() for _, named in test.methods]
    return {
        **new_record("fidelity", settings, loaded.model.device),
        "model": {
            "name": loaded.name,
            "dtype": name_of(loaded.model.dtype),
            "layers": config.num_hidden_layers,
            "measured_layers": len({row["layer"] for row in found.layers}),
        },
        "texts": [text.describe() for text in texts],
        "methods": list(dict.fromkeys(named.name for named in (*compared, *as_published))),
        "published": [named.name for named in as_published],
        "specs": {named.name: named.describe() for named in (*compared, *as_published, *variants)},
        "paper_tests": {
            name: {
                "title": test.title,
                "densities": test.densities or settings["densities"],
                "methods": [[label, named.name] for label, named in test.methods],
            }
            for name, test in tests.items()
        },
        "other_calls": found.other_calls,
        "unreachable": [
            {"method": candidate.named.name, "target": candidate.density, "reason": reason}
            for candidate, reason in found.unreachable.items()
        ],
        "propagated": found.propagated,
        "layers": found.layers,
    }


def _paper_tests(text: str) -> dict[str, PaperTest]:
    from stem_attn.lab.fidelity.paper_tests import PAPER_TESTS

    names = listed(text)
    unknown = [name for name in names if name not in PAPER_TESTS]
    if unknown:
        raise InputError(f"unknown --paper-tests {', '.join(unknown)}; known: {', '.join(PAPER_TESTS)}")
    return {name: PAPER_TESTS[name] for name in names}
