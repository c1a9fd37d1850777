"""`stem-attn inspect`: what was pruned of a prompt, as a page to look at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stem_attn.lab.configs import DEMO, plain_settings
from stem_attn.lab.devices import check_dtype, name_of
from stem_attn.lab.errors import InputError, require
from stem_attn.lab.inputs import read_text
from stem_attn.lab.options import (
    METHOD,
    OUTPUT,
    PROMPT,
    DeviceOption,
    DtypeOption,
    GgufOption,
    ModelOption,
    QuestionOption,
    VariantOption,
    listed,
    load_model,
)
from stem_attn.lab.results import Record, check_folder, new_record, print_text, write_files

if TYPE_CHECKING:
    from stem_attn.lab.models import LoadedModel
    from stem_attn.lab.named_methods import NamedMethod
    from stem_attn.lab.prompts import Prompt

_TOKENS = 4160  # from 4096 on every preset is sparse
_DEMO = "stem-demo"
_PICTURES = ("heads.png", "layers.png", "worst_head.png")


def inspect(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Where inspect.html, inspect.json and the PNG pictures go.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("stem-inspect"),
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-",
            help="Your own text, UTF-8; - is stdin. Default: Python's language reference.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    question: QuestionOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Cut the text so that the whole prompt has at most N tokens. Default: {_TOKENS} of the embedded "
            "text, all of your own.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            help="One method, or two to compare: stem-demo (made for short prompts), stem-default, stem-official, "
            "stem-paper, or a rival. Default: stem-demo, unless there is a --variant.",
            rich_help_panel=METHOD,
        ),
    ] = "",
    variant: VariantOption = None,
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens a block, of every method.", rich_help_panel=METHOD)
    ] = 64,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Show N query blocks of the prompt. Default: all, or as many as the page can hold.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Show what was pruned of a prompt in every layer and head, over the true attention, and whether it mattered.

    Writes a page that needs no network, pictures of it, and every number. With two methods it shows them side by side.
    """
    require("transformers", "gguf", "jinja2", "matplotlib", extra="eval")
    # Everything that can be refused without the model is refused before it loads.
    chosen = _methods(methods, variant or [], block_size)
    check_dtype(dtype)
    own = read_text(prompt_file) if prompt_file is not None else None
    check_folder(out, out / "inspect.json", out / "inspect.html", *(out / name for name in _PICTURES))

    from stem_attn.lab.can_attend import check_can_attend
    from stem_attn.lab.inspect.pack import rows_to_show
    from stem_attn.lab.inspect.report import contents, numbers, sentence
    from stem_attn.lab.inspect.run import look
    from stem_attn.lab.progress import show_progress

    loaded = load_model(model, gguf, device, dtype)
    check_can_attend(loaded.model, *(named.build(block_size) for named in chosen))
    prompt = _prompt(loaded, own, question, max_tokens)
    _check_length(prompt, loaded, chosen, block_size)
    config = loaded.model.config.get_text_config()
    for named in chosen:
        named.check_layers(config.num_hidden_layers)
    k_blocks = -(-prompt.tokens // block_size)
    shown = rows_to_show(k_blocks, config.num_hidden_layers * config.num_attention_heads, rows)
    steps = config.num_hidden_layers * (1 + len(chosen))
    with show_progress("inspect", "layers", steps, at_most=True) as progress:
        found = look(loaded.model, prompt.ids, chosen, block_size=block_size, rows=shown, on_step=progress.starts)

    settings: Record = {
        "block_size": block_size,
        "rows": len(shown),
        "methods": {named.name: _fields(named, block_size) for named in chosen},
    }
    record: Record = {
        **new_record("inspect", settings, loaded.model.device),
        "model": {"name": Path(loaded.name).name, "dtype": name_of(loaded.model.dtype)},
        "prompt": prompt.describe(),
        **numbers(found, [named.name for named in chosen]),
    }
    files = contents(record, found, _block_texts(loaded, prompt, block_size))
    write_files({out / name: content for name, content in files.items()})
    print_text(f"{sentence(record)}\n{out / 'inspect.html'}\n")


def _methods(names: str, variants: list[str], block_size: int) -> list[NamedMethod]:
    """Return one or two methods of one block size."""
    from stem_attn.lab.named_methods import parse_methods

    names = names or ("" if variants else _DEMO)
    if _DEMO in listed(names):
        fields = {name: value for name, value in DEMO.items() if name != "block_size"}
        variants = [
            ",".join([f"{_DEMO}=stem-default", *(f"{name}={value}" for name, value in fields.items())]),
            *variants,
        ]
    chosen = parse_methods(names, variants)
    if not 1 <= len(chosen) <= 2:
        raise InputError(
            f"inspect shows one method or two, got {', '.join(named.name for named in chosen) or '(none)'}"
        )
    for named in chosen:
        size = named.build(block_size).block_size
        if size != block_size:
            raise InputError(
                f"method {named.name} has blocks of {size}, and --block-size is {block_size}: take one size"
            )
    return chosen


def _prompt(loaded: LoadedModel, own: tuple[str, str] | None, question: str | None, max_tokens: int | None) -> Prompt:
    from stem_attn.lab.prompts import build_prompt, public_text

    text, source = own or public_text()
    if own is None and max_tokens is None:
        max_tokens = min(loaded.context_tokens, _TOKENS)
    return build_prompt(loaded.tokenizer, text, source=source, question=question, max_tokens=max_tokens)


def _check_length(prompt: Prompt, loaded: LoadedModel, methods: list[NamedMethod], block_size: int) -> None:
    if prompt.tokens <= block_size:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens, which is one block of {block_size}: there is nothing to prune. "
            f"Take a longer text, or a smaller --block-size"
        )
    if prompt.tokens > loaded.context_tokens:
        raise InputError(
            f"the prompt has {prompt.tokens} tokens, but the model's context holds {loaded.context_tokens}; cut the "
            f"text with --max-tokens {loaded.context_tokens}"
        )
    for named in methods:
        if prompt.tokens < named.policy.min_seq_len:
            raise InputError(
                f"the prompt has {prompt.tokens} tokens, too short: {named.name} starts at {named.policy.min_seq_len} "
                f"(min_seq_len) and leaves shorter prompts to dense attention"
            )


def _fields(named: NamedMethod, block_size: int) -> Record:
    """Return all settings of a method as plain values."""
    from stem_attn.methods import Stem

    method = named.build(block_size)
    if isinstance(method, Stem):
        return plain_settings(method.config, named.policy)
    values = dataclasses.asdict(method)  # type: ignore[call-overload]
    return {"method": named.base, **json.loads(json.dumps(values, default=str))}


def _block_texts(loaded: LoadedModel, prompt: Prompt, block_size: int) -> list[str]:
    """Return the text of every block."""
    ids = prompt.ids[0].tolist()
    return [str(loaded.tokenizer.decode(ids[i : i + block_size])) for i in range(0, len(ids), block_size)]
