"""Methods named on a command line: `stem-official`, `xattention`, or a name of your own with changed settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from stem_attn import methods
from stem_attn.config import PRESETS, StemConfig
from stem_attn.lab.configs import fields_from_file, read_changes
from stem_attn.lab.errors import InputError
from stem_attn.lab.tail import WithTail, tail_fields
from stem_attn.methods import Method, Stem
from stem_attn.methods.base import Rival
from stem_attn.policy import PrefillPolicy, make_settings

_STEM = "stem-"
_CONFIG = "config:"
_TAIL = "+tail"
# A comma inside a JSON value is not followed by `name=`.
_BETWEEN_FIELDS = re.compile(r",(?=\s*\w+\s*=)")


@dataclass(frozen=True, slots=True)
class NamedMethod:
    """A method before the block size and the density are known.

    Args:
        name: How tables and plots call it.
        base: `stem-PRESET`, or a name from `methods.METHODS`.
        fields: What differs from the preset or from the published defaults.
        rows: Of the prompt's query rows, which ones the method decides about, as shares from 0 to 1; the others keep
            everything.
        tail: Whether the prompt's last rows keep what those of the default config keep.
    """

    name: str
    base: str
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    rows: tuple[float, float] = (0.0, 1.0)
    tail: bool = False

    def build(self, block_size: int) -> Method:
        """Return the method with its published settings, those replaced that `fields` names.

        Raises:
            InputError: A field is unknown, or a value is out of range.
        """
        fields = {"block_size": block_size, **self.fields}
        try:
            if self.base.startswith(_STEM):
                if self.tail:
                    fields = {**tail_fields(), **fields}
                return Stem(make_settings(fields, self.base.removeprefix(_STEM))[0])
            if self.base == "uniform":
                # Everything but the schedule is the official method's, so that the schedule alone is compared.
                fields = {"config": StemConfig.preset("official", block_size=fields.pop("block_size")), **fields}
            method = methods.make(self.base, **fields)
            if not self.tail:
                return method
            return WithTail(method=cast(Rival, method), config=StemConfig(block_size=method.block_size))
        except (ValueError, TypeError) as error:
            raise InputError(f"method {self.name}: {error}") from error

    @property
    def policy(self) -> PrefillPolicy:
        """Which prompts and layers an adapter computes sparsely: Stem's as its preset and `fields` say, others all.

        What is slower than dense attention is measured all the same.

        Raises:
            InputError: A field is unknown, or a value is out of range.
        """
        if not self.base.startswith(_STEM):
            return PrefillPolicy(min_seq_len=0, crossover=False)
        try:
            policy = make_settings(self.fields, self.base.removeprefix(_STEM))[1]
        except ValueError as error:
            raise InputError(f"method {self.name}: {error}") from error
        return dataclasses.replace(policy, crossover=False)

    @property
    def density_is_its_own(self) -> bool:
        """Whether the method has no one density to be brought to: dense, and budgets by layer."""
        return self.base == "dense" or bool(self.fields.get("layer_budgets"))

    def check_layers(self, layers: int) -> None:
        """Refuse what is not for a model of so many layers.

        Raises:
            InputError: The policy names layers that the model lacks, or has not a budget for each.
        """
        try:
            self.policy.check_layers(layers)
        except ValueError as error:
            raise InputError(f"method {self.name}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return dataclasses.asdict(self)


def known_methods() -> tuple[str, ...]:
    """Return the names that need no definition."""
    presets = tuple(f"{_STEM}{preset}" for preset in PRESETS)
    return (*presets, *(name for name in methods.METHODS if name != "stem"))


def parse_methods(names: str, variants: Iterable[str] = ()) -> list[NamedMethod]:
    """Read `--methods NAME,NAME,...` and `--variant NAME=BASE,FIELD=VALUE,...`.

    Args:
        names: Known methods, with `+tail` or without, or names of variants, separated by commas. Variants need not be
            named again.
        variants: Each gives a name to a known method with changed fields; a value is JSON, or else a plain string.
            `config:FILE` stands for Stem with the fields of a config file, `config:-` of stdin.

    Returns:
        The methods in the order given, variants last, each once.

    Raises:
        InputError: A name is unknown or used twice, or a variant is malformed.
    """
    defined: dict[str, NamedMethod] = {}
    for text in variants:
        named = _variant(text)
        if named.name in defined or named.name in known_methods():
            raise InputError(f"--variant {text!r}: the name {named.name} is taken")
        defined[named.name] = named
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    found = [defined[name] if name in defined else _named(name, name) for name in chosen]
    return list({named.name: named for named in (*found, *defined.values())}.values())


def _variant(text: str) -> NamedMethod:
    name, equals, rest = text.partition("=")
    base, *pairs = _BETWEEN_FIELDS.split(rest)
    if not equals or not name.strip() or not base.strip():
        raise InputError(f"--variant takes NAME=METHOD,FIELD=VALUE,..., got {text!r}")
    base, fields = base.strip(), {}
    if base.startswith(_CONFIG):
        base, fields = f"{_STEM}default", fields_from_file(Path(base.removeprefix(_CONFIG)))
    return dataclasses.replace(_named(name.strip(), base), fields={**fields, **read_changes(pairs)})


def _named(name: str, method: str) -> NamedMethod:
    base, tail = method.removesuffix(_TAIL), method.endswith(_TAIL)
    if base not in known_methods():
        raise InputError(
            f"unknown method {method!r}; known: {', '.join(known_methods())}, each but dense also with {_TAIL}"
        )
    if tail and base == "dense":
        raise InputError(f"method {name}: dense attention keeps everything, its tail too; leave {_TAIL} out")
    return NamedMethod(name, base, tail=tail)
