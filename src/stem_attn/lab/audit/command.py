"""`stem-attn eval audit`: whether the audit's intervals hold the truth, and what an audit costs."""

from __future__ import annotations

from typing import Annotated

import typer

from stem_attn.lab.configs import plain_settings, settings_from_options
from stem_attn.lab.devices import check_dtype, name_of
from stem_attn.lab.errors import InputError, require
from stem_attn.lab.options import (
    PROMPT,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    GgufOption,
    JsonOption,
    LengthOption,
    ModelOption,
    PresetOption,
    SetOption,
    TextFileOption,
    load_model,
)
from stem_attn.lab.results import Record, check_outputs, deliver, new_record

_ROWS = 256


def audit(
    model: ModelOption = None,
    gguf: GgufOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    length: LengthOption = 4096,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts.", rich_help_panel=PROMPT)] = 3,
    text_file: TextFileOption = None,
    draws: Annotated[int, typer.Option(min=1, metavar="N", help="Audits of every layer and prompt.")] = 10,
    rounds: Annotated[int, typer.Option(min=0, metavar="N", help="Timed prefills of each kind; 0: none.")] = 5,
    preset: PresetOption = "default",
    config_file: ConfigOption = None,
    override: SetOption = None,
    json_path: JsonOption = None,
) -> None:
    """Check the audit of a prefill against all rows of every layer, and time it.

    Audits take --set audit_rows=N rows (256 by default).
    """
    require("transformers", "gguf", extra="demo")
    config, policy = settings_from_options(preset, [f"audit_rows={_ROWS}", *(override or [])], config_file)
    if not policy.audit_rows:
        raise InputError("--set audit_rows=0 audits nothing: take at least 1")
    check_dtype(dtype)
    check_outputs(json_path)

    from stem_attn.lab.audit import run
    from stem_attn.lab.audit.report import render
    from stem_attn.lab.can_attend import check_can_attend
    from stem_attn.lab.progress import show_progress
    from stem_attn.lab.texts import excerpts

    loaded = load_model(model, gguf, device, dtype)
    check_can_attend(loaded.model, config)
    if length > loaded.context_tokens:
        raise InputError(f"--length {length} is more than the model's context of {loaded.context_tokens} tokens")
    texts = excerpts(loaded.tokenizer, length, prompts, text_file or [])
    shape = loaded.model.config.get_text_config()
    settings: Record = {
        "length": length,
        "prompts": prompts,
        "draws": draws,
        "rounds": rounds,
        "preset": preset,
        "config": plain_settings(config, policy),
    }
    record: Record = {
        **new_record("audit", settings, loaded.model.device),
        "model": {"name": loaded.name, "dtype": name_of(loaded.model.dtype)},
        "texts": [text.describe() for text in texts],
        "layers": [],
    }
    timed = (rounds + 1) * len(run.TIMED) if rounds else 0
    with show_progress("eval audit", "steps", prompts * shape.num_hidden_layers + timed) as progress:
        for number, text in enumerate(texts):
            rows = run.check_layers(loaded.model, text.ids, config, policy, draws=draws, on_step=progress.starts)
            record["layers"] += [{"prompt": number, **row} for row in rows]
        if rounds:
            record["times"] = run.time_prefills(
                loaded.model, texts[0].ids, config, policy, rounds=rounds, on_step=progress.starts
            )
    record["summary"] = run.summarise(record["layers"])
    record["work_share"] = run.work_share(record["layers"][0]["rows"], shape.num_attention_heads, length)
    deliver(record, render(record), json_path)
