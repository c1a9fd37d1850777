"""Read the records of other commands: what each says about speed and about accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stem_attn import __version__
from stem_attn.config import PRESETS, StemConfig
from stem_attn.lab import machine
from stem_attn.lab.configs import DEMO, plain_settings
from stem_attn.lab.errors import InputError
from stem_attn.lab.results import Record
from stem_attn.policy import PrefillPolicy, make_settings

ATTENTION = "attention alone"
"""The kind of speed that says nothing about the rest of a model."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Dense against Stem at one length.

    Args:
        kind: What was timed.
        length: Tokens of the prompt.
        dense_seconds: Median.
        stem_seconds: Median, selection included.
        density: Kept over causal blocks; None: not told.
        settings: Stem's, in words.
        where: The machine in a few words.
        file: Where it is from.
    """

    kind: str
    length: int
    dense_seconds: float
    stem_seconds: float
    density: float | None
    settings: str
    where: str
    file: str

    @property
    def ratio(self) -> float:
        """Dense over Stem: above 1, Stem is faster."""
        return self.dense_seconds / self.stem_seconds


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What one method does to a model at one length; None: not measured there.

    Args:
        kind: What was measured.
        model: The model's name.
        length: Tokens of the prompts.
        method: Its name.
        is_stem: Whether it is Stem and no rival.
        density: Kept over causal blocks.
        block_size: Tokens a block; None: not told.
        file: Where it is from.
        top1_agreement: Share of positions with the same most likely next token.
        kl_nats: Mean KL(dense || sparse).
        points: Score minus dense, on a scale of 100.
        interval: Of the points, 95%.
        samples: Prompts that the points are of; None: not told.
    """

    kind: str
    model: str
    length: int
    method: str
    is_stem: bool
    density: float
    block_size: int | None
    file: str
    top1_agreement: float | None = None
    kl_nats: float | None = None
    points: float | None = None
    interval: tuple[float, float] | None = None
    samples: int | None = None


@dataclass(slots=True)
class Evidence:
    """Everything that files say.

    Args:
        records: The records by file name.
        speeds: All there are.
        accuracies: All there are.
        ignored: JSON files that are no records.
    """

    records: dict[str, Record] = field(default_factory=dict)
    speeds: list[Speed] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def read(folders: Sequence[Path]) -> Evidence:
    """Read every result file in folders, and in the folders below.

    Raises:
        InputError: There is none, one cannot be read or is of another version, or they are of several machines or
            models.
    """
    found = Evidence()
    for file in json_files(folders):
        _add(file, found)
    if not found.records:
        raise InputError(
            f"no result file of stem-attn in {', '.join(map(str, folders))}: bench, eval, tune, serving, prefill and "
            f"inspect write such files (--out, --json)"
        )
    _one_of("machines", "speed", {speed.file: speed.where for speed in found.speeds})
    _one_of("models", "accuracy", {one.file: one.model for one in found.accuracies})
    return found


def settings_in_words(config: Record) -> str:
    """Name settings by their preset, as accuracy files do, or by what differs from the default ones."""
    named = {preset: (StemConfig.preset(preset), PrefillPolicy.preset(preset)) for preset in PRESETS}
    for preset, settings in (named | {"demo": make_settings(DEMO)}).items():
        if config == plain_settings(*settings):
            return f"stem-{preset}"
    default = plain_settings(*named["default"])
    changed = {name: value for name, value in config.items() if value != default.get(name)}
    match changed.get("budget_ratio"):
        case [[None, ratio]]:  # one step for all lengths
            changed["budget_ratio"] = ratio
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in changed.items())


def json_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the result files in folders, each once; a file stands for itself.

    Raises:
        InputError: A folder does not exist.
    """
    seen = set()
    for folder in folders:
        if not folder.exists():
            raise InputError(f"no such folder: {folder}")
        for file in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _add(file: Path, found: Evidence) -> None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # no JSON, no UTF-8
        raise InputError(f"{file} is no JSON, or is cut off: {error}") from error
    version = _version(record)
    if version is None:
        found.ignored.append(str(file))
        return
    try:
        record["settings"], record["date"], record["arguments"]
        reader = _READERS.get(record["command"])
        if reader is None:
            raise ValueError(f"command {record['command']!r}")
        for one in reader(record, str(file)):
            (found.speeds if isinstance(one, Speed) else found.accuracies).append(one)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        wrong = f"no {error} in it" if isinstance(error, KeyError) else f"not as expected: {error}"
        raise InputError(
            f"{file} was written by stem-attn {version}, and {__version__} cannot read it ({wrong}): measure again, or "
            f"name the other files in the place of their folder"
        ) from error
    found.records[str(file)] = record


def _version(record: Any) -> Any:
    """Return the version of stem-attn that wrote a record; None: it is another program's."""
    for name in ("machine", "versions", "stem-attn"):
        if not isinstance(record, dict):
            return None
        record = record.get(name)
    return record


def _one_of(what: str, about: str, by_file: dict[str, str]) -> None:
    """Refuse to judge several machines or models together."""
    files = {value: file for file, value in by_file.items()}
    if len(files) > 1:
        listed = "; ".join(f"{value} in {file}" for value, file in files.items())
        raise InputError(f"the results about {about} are of several {what}, and one verdict is for one: {listed}")


def _prefill(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    length, config = record["prompt"]["tokens"], record["settings"]["config"]
    sides = record["dense"]["prefill_seconds"], record["stem"]["prefill_seconds"]
    words, where = settings_in_words(config), machine.name(record["machine"])
    yield Speed("prefill of a real model", length, *sides, record["density"], words, where, file)
    yield Accuracy(
        "next tokens, one prompt",
        _name(record["model"]),
        length,
        words,
        True,
        record["density"],
        config["block_size"],
        file,
        record["top1_agreement"],
        record["mean_kl_nats"],
    )


def _bench(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    words, where = settings_in_words(record["settings"]["config"]), machine.name(record["machine"])
    for case in record["cases"]:
        if record["settings"]["kind"] == "ttft":
            sides = case["dense"]["s"]["median"], case["stem"]["s"]["median"]
            yield Speed("whole model, random weights", case["k_len"], *sides, case["density"], words, where, file)
            continue
        medians: dict[str, list[float]] = {"dense": [], "whole": []}
        for measured in case["methods"]:
            if measured["part"] in medians:
                medians[measured["part"]].append(measured["ms"]["median"] / 1000)
        if all(medians.values()):  # the fastest of each side, whichever kernel it is
            sides = min(medians["dense"]), min(medians["whole"])
            yield Speed(ATTENTION, case["k_len"], *sides, case["density"], words, where, file)


def _serving(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    where = machine.name(record["machine"])
    fields = dict(record["settings"]["stem"])
    preset = fields.pop("preset", "default")
    words = settings_in_words(plain_settings(*make_settings(fields, preset)))
    for case in record["records"]:
        seconds = case["first_token_seconds"]
        if not {"dense", "stem"} <= seconds.keys():
            continue
        stats = case["runs"]["stem"][0]["stats"]
        yield Speed(
            "first token in vLLM",
            case["length"],
            seconds["dense"],
            seconds["stem"],
            stats["density"],
            words,
            where,
            file,
        )


def _fidelity(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    groups: dict[tuple[str, float | None], list[Record]] = {}
    for row in record["propagated"]:
        groups.setdefault((row["method"], row["target"]), []).append(row)
    for (method, _), rows in groups.items():
        if method == "dense":
            continue
        spec = record["specs"][method]
        yield Accuracy(
            f"next tokens, {len(rows)} prompts",
            _name(record["model"]["name"]),
            record["settings"]["length"],
            method,
            spec["base"].startswith("stem-"),
            _mean([row["density"] for row in rows]),
            spec["fields"].get("block_size", record["settings"]["block_size"]),
            file,
            _mean([row["top1_agreement"] for row in rows]),
            _mean([row["kl_nats"] for row in rows]),
        )


def _tasks(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    # Files that `eval report` wrote before it kept the methods' settings know no more than their names.
    specs = {spec["name"]: spec for spec in record["settings"].get("methods", ())}
    not_mastered = {(each["task"], each["length"]) for each in record["not_in_means"]}
    for cell in record["cells"]:
        # What dense attention cannot do either says nothing.
        if cell["minus_dense"] is None or (cell["task"], cell["length"]) in not_mastered:
            continue
        spec, interval = specs.get(cell["method"], {}), cell["minus_dense"]["interval"]
        yield Accuracy(
            f"task {cell['task']}",
            _name(record["model"]),
            cell["length"],
            cell["method"],
            spec.get("base", cell["method"]).startswith("stem-"),
            cell["budget"],
            spec.get("fields", {}).get("block_size", record["settings"].get("block_size")),
            file,
            points=cell["minus_dense"]["mean"],
            interval=None if interval is None else (interval[0], interval[1]),
            samples=cell.get("samples"),
        )


def _tune(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    held_out = record.get("held_out")
    numbers = (held_out or record)["tuned"]
    yield Accuracy(
        "next tokens, other prompts than tuned on" if held_out else "next tokens, the prompts tuned on",
        _name(record["model"]["name"]),
        record["settings"]["length"],
        "tuned by layer",
        True,
        numbers["density"],
        record["config"]["block_size"],
        file,
        numbers["top1_agreement"],
        numbers["kl_nats"],
    )


def _inspect(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    for one in record["methods"]:
        fields = record["settings"]["methods"][one["name"]]
        yield Accuracy(
            "next tokens, one prompt",
            _name(record["model"]["name"]),
            record["prompt"]["tokens"],
            one["name"],
            "method" not in fields,
            one["density"],
            record["settings"]["block_size"],
            file,
            one["top1_agreement"],
            one["mean_kl_nats"],
        )


def _nothing(record: Record, file: str) -> Iterator[Speed | Accuracy]:
    """Read a record that does not compare a model or a kernel with dense attention."""
    yield from ()


_READERS: dict[Any, Callable[[Record, str], Iterator[Speed | Accuracy]]] = {
    "prefill": _prefill,
    "bench": _bench,
    "serving": _serving,
    "fidelity": _fidelity,
    "ruler": _tasks,
    "tasks": _tasks,
    "report": _tasks,
    "tune": _tune,
    "inspect": _inspect,
    "audit": _nothing,
    "density": _nothing,
    "doctor": _nothing,
}


def _name(model: Any) -> str:
    """Return a model's name without the folder that it was in."""
    if not isinstance(model, str):
        raise TypeError(f"model {model!r}")
    return Path(model).name


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
