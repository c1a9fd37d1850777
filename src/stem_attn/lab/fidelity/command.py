"""`stem-attn eval fidelity`: what each method of sparse attention costs in fidelity, at equal density, on real text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stem_attn.lab.errors import InputError, require
from stem_attn.lab.model_options import DeviceOption, DtypeOption, GgufOption, ModelOption, check_dtype, load_model

if TYPE_CHECKING:
    from stem_attn.lab.fidelity.paper_tests import PaperTest
    from stem_attn.lab.fidelity.run import Case, Found
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.named_methods import MethodSpec
    from stem_attn.lab.texts import Excerpt

_TEXT, _METHOD, _OUTPUT = "Text", "Methods", "Output"
_SEED = 0


def fidelity(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Where fidelity.json, fidelity.md, layers.csv, propagated.csv and the plots go.",
            rich_help_panel=_OUTPUT,
        ),
    ],
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    length: Annotated[int, typer.Option(min=64, metavar="N", help="Tokens of a prompt.", rich_help_panel=_TEXT)] = 8192,
    prompts: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Independent prompts, of the documents in turn.", rich_help_panel=_TEXT),
    ] = 3,
    text_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Document of your own, UTF-8; may be repeated. Default: Python's language reference, the source of "
            "its standard library, and PyTorch's reference pages.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="stem-official, stem-default, stem-paper, and the baselines. Compared at every density.",
            rich_help_panel=_METHOD,
        ),
    ] = "stem-official,stem-default,uniform,xattention,flexprefill,minference,flashprefill,a_shape,oracle,dense",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=METHOD,FIELD=VALUE,...",
            help="A method of your own: a known one with other settings, or config:FILE with those of a config file; "
            "compared as well. May be repeated.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    published: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Methods and variants measured as published too, at whatever density their settings give.",
            rich_help_panel=_METHOD,
        ),
    ] = "",
    densities: Annotated[
        str,
        typer.Option(
            metavar="D,D,...",
            help="Kept over causal blocks, forced blocks included; the same in every layer.",
            rich_help_panel=_METHOD,
        ),
    ] = "0.12,0.22",
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens a block, of every method.", rich_help_panel=_METHOD)
    ] = 32,
    paper_tests: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The paper's tests to run as well: table1, table5, figure3, figure5.",
            rich_help_panel=_METHOD,
        ),
    ] = "",
    logit_stride: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Compare the predictions of every N-th position; more saves time where the vocabulary is large.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 1,
) -> None:
    """Measure attention error, attention recall, KL and top-1 agreement of sparse attention at equal density.

    Every method selects blocks; all attend through the same backends. Attention errors are taken layer by layer on the
    q, k, v of a dense forward, predictions from a forward in which every full attention layer is sparse. Sliding-window
    layers stay exact.
    """
    require("transformers", "gguf", "matplotlib", extra="dev")
    from stem_attn.lab.named_methods import parse_methods

    # Everything that can be refused without the model is refused before it loads.
    check_dtype(dtype)
    specs = parse_methods(methods, variant or [])
    own = {spec.name: spec for spec in specs}
    names = [name.strip() for name in published.split(",") if name.strip()]
    as_published = [own[name] if name in own else parse_methods(name)[0] for name in names]
    wanted = _densities(densities)
    tests = _paper_tests(paper_tests)
    cases = _cases(specs, as_published, wanted, tests, block_size)
    _make_folder(out)

    import torch

    from stem_attn.lab.fidelity.files import write_files
    from stem_attn.lab.fidelity.run import Found, measure_prompt
    from stem_attn.lab.texts import excerpts

    torch.manual_seed(_SEED)
    loaded = load_model(model, gguf, device, dtype)
    if length > loaded.context_tokens:
        raise InputError(f"--length {length} is more than the model's context of {loaded.context_tokens} tokens")
    for case in cases:
        case.spec.check_layers(loaded.model.config.get_text_config().num_hidden_layers)
    texts = excerpts(loaded.tokenizer, length, prompts, text_file or [])
    found = Found()
    settings: dict[str, Any] = {
        "length": length,
        "block_size": block_size,
        "densities": wanted,
        "logit_stride": logit_stride,
        "seed": _SEED,
        "seconds_by_prompt": [],
    }
    for number, text in enumerate(texts):
        name, start = f"prompt {number + 1}/{len(texts)}", time.perf_counter()
        with _progress(name) as on_step:
            measure_prompt(
                loaded.model,
                text.ids,
                found.left(cases),
                prompt=number,
                block_size=block_size,
                logit_stride=logit_stride,
                on_step=on_step,
                found=found,
            )
        settings["seconds_by_prompt"].append(round(time.perf_counter() - start, 1))
        # A run that is cut off leaves the prompts that it has done.
        write_files(_record(loaded, settings, texts[: number + 1], specs, as_published, tests, found), out)
        print(f"{name}: {len(found.left(cases))} cases, written to {out}", file=sys.stderr, flush=True)
    print((out / "fidelity.md").read_text())


def _cases(
    specs: Sequence[MethodSpec],
    as_published: Sequence[MethodSpec],
    densities: list[float],
    tests: dict[str, PaperTest],
    block_size: int,
) -> list[Case]:
    """Return everything to measure, each once; refuse methods that cannot be built."""
    from stem_attn.lab.fidelity.run import Case

    cases = [Case(spec, density) for spec in specs for density in densities if not spec.density_is_its_own]
    # Dense shows what rounding alone makes of the numbers.
    cases += [Case(spec, None) for spec in (*as_published, *(spec for spec in specs if spec.density_is_its_own))]
    for test in tests.values():
        cases += [Case(spec, density) for _, spec in test.methods for density in test.densities or densities]
    for case in cases:
        case.spec.build(block_size)
    if not cases:
        raise InputError("nothing to measure: name some --methods, a --variant or --paper-tests")
    return list(dict.fromkeys(cases))


def _record(
    loaded: LoadedModel,
    settings: dict[str, Any],
    texts: Sequence[Excerpt],
    specs: Sequence[MethodSpec],
    as_published: Sequence[MethodSpec],
    tests: dict[str, PaperTest],
    found: Found,
) -> dict[str, Any]:
    from stem_attn.lab import machine

    config = loaded.model.config.get_text_config()
    variants = [spec for test in tests.values() for _, spec in test.methods]
    return {
        "command": "fidelity",
        "settings": settings,
        "model": {
            "name": loaded.name,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "layers": config.num_hidden_layers,
            "measured_layers": len({row["layer"] for row in found.layers}),
        },
        "machine": machine.describe(loaded.model.device),
        "texts": [text.describe() for text in texts],
        "methods": list(dict.fromkeys(spec.name for spec in (*specs, *as_published))),
        "published": [spec.name for spec in as_published],
        "specs": {spec.name: spec.describe() for spec in (*specs, *as_published, *variants)},
        "paper_tests": {
            name: {
                "title": test.title,
                "densities": test.densities or settings["densities"],
                "methods": [[label, spec.name] for label, spec in test.methods],
            }
            for name, test in tests.items()
        },
        "other_calls": found.other_calls,
        "unreachable": [
            {"method": case.spec.name, "target": case.density, "reason": reason}
            for case, reason in found.unreachable.items()
        ],
        "propagated": found.propagated,
        "layers": found.layers,
    }


def _densities(text: str) -> list[float]:
    try:
        found = [float(item) for item in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < density <= 1 for density in found):
        raise InputError(f"--densities takes numbers above 0 and up to 1, separated by commas; got {text!r}")
    return found


def _paper_tests(text: str) -> dict[str, PaperTest]:
    from stem_attn.lab.fidelity.paper_tests import PAPER_TESTS

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PAPER_TESTS]
    if unknown:
        raise InputError(f"unknown --paper-tests {', '.join(unknown)}; known: {', '.join(PAPER_TESTS)}")
    return {name: PAPER_TESTS[name] for name in names}


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from error


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    """Show a bar that names every layer of the dense forward and every sparse forward as it starts."""
    from transformers.utils import logging

    with logging.tqdm(desc=name, unit="step", leave=False) as bar:

        def on_step(step: str) -> None:
            bar.set_description(f"{name}, {step}")
            bar.update()

        yield on_step
