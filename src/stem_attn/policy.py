"""What an adapter decides about a model's prefill, beside the method: which prompts and layers are sparse at all.

The core never decides this. `stem_attention` does what its config says at any length.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from stem_attn.audit import Audit, AuditSums, rows_to_show
from stem_attn.backends.base import Backend, Geometry
from stem_attn.blocks import BlockGrid
from stem_attn.budget import budget_of
from stem_attn.config import StemConfig, check_float, check_int, field_names
from stem_attn.selection import most_kept

USUAL_REASONS = frozenset({"decode", "short prompt", "dense layer", "no gain from sparsity"})
"""Reasons for dense attention that belong to normal use in every adapter; others are worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPolicy:
    """Say which prompts and layers of a model an adapter computes sparsely.

    Args:
        min_seq_len: Tokens; an adapter leaves shorter prompts to dense attention.
        dense_layers: Indices of the layers that stay dense; negative ones count from the end.
        depth_decay: Factor on the last layer's budget, above 0 and at most 1. The first layer's is 2 minus that, and in
            between it falls evenly with depth, so that the mean stays: an error of an early layer flows through all
            later ones. 1: all layers alike. A budget of everything stays everything.
        layer_budgets: In the place of that, one more factor on the budget for every layer of the model, in order; what
            `stem-attn tune` finds. Layers that are dense or have a sliding window ignore theirs. Empty: none.
        crossover: Whether prompts that keep too many blocks to be faster than dense attention stay dense. Turn it off
            to study accuracy.
        audit_rows: Query rows of single heads that are also attended exactly, a layer's call and sequence, to tell how
            true its sparse attention was; see `stem_attn.audit`. 0: none.
        min_recall: A layer's call is attended again, densely, where the audit does not show that its sparse attention
            keeps at least this share of the attention probability; in vLLM each sequence of a call. None: whatever it
            keeps. The Triton backend decides on the GPU; elsewhere the host waits for the audit.
        max_error: The same for the relative error of the layer's attention output.

    Raises:
        ValueError: A field has the wrong type or lies outside its range.
    """

    min_seq_len: int = 4096
    dense_layers: tuple[int, ...] = ()
    depth_decay: float = 0.3
    layer_budgets: tuple[float, ...] = ()
    crossover: bool = True
    audit_rows: int = 0
    min_recall: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        check_int("min_seq_len", self.min_seq_len, 0)
        check_float("depth_decay", self.depth_decay, 0.0, 1.0)
        if self.depth_decay == 0:
            raise ValueError("depth_decay must be above 0, got 0")
        layers, factors = self.dense_layers, self.layer_budgets
        if not isinstance(layers, tuple | list) or any(type(i) is not int for i in layers):
            raise ValueError(f"dense_layers must be a sequence of layer indices, got {layers!r}")
        if not isinstance(factors, tuple | list):
            raise ValueError(f"layer_budgets must be a sequence of factors, one a layer, got {factors!r}")
        for factor in factors:
            check_float("layer_budgets", factor, 0.0, math.inf)
        if not isinstance(self.crossover, bool):
            raise ValueError(f"crossover must be True or False, got {self.crossover!r}")
        check_int("audit_rows", self.audit_rows, 0)
        self._check_targets()
        object.__setattr__(self, "dense_layers", tuple(layers))
        object.__setattr__(self, "layer_budgets", tuple(float(factor) for factor in factors))

    def _check_targets(self) -> None:
        lost = {}
        if self.min_recall is not None:
            check_float("min_recall", self.min_recall, 0.0, 1.0)
            lost["min_recall"] = 1 - self.min_recall
        if self.max_error is not None:
            check_float("max_error", self.max_error, 0.0, math.inf)
            lost["max_error"] = self.max_error**2
        for name, share in lost.items():
            if not share:
                raise ValueError(f"{name}={getattr(self, name)} is dense attention, which no sample can show")
            if self.audit_rows < rows_to_show(share):
                raise ValueError(
                    f"{name}={getattr(self, name)} needs audit_rows of at least {rows_to_show(share)}: fewer rows "
                    f"cannot show it, however true the attention is; got {self.audit_rows}"
                )
            object.__setattr__(self, name, float(getattr(self, name)))  # kernels are compiled for floats

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PrefillPolicy:
        """Return the policy that goes with a preset of `StemConfig`, with some fields replaced.

        Args:
            name: A preset's name.
            overrides: Fields of `PrefillPolicy` to replace.

        Raises:
            ValueError: The preset is unknown, or a value is out of range.
        """
        StemConfig.preset(name)  # says which there are
        return cls(**{**_PRESETS.get(name, {}), **overrides})

    def check_layers(self, layers: int) -> None:
        """Check that the policy is one for a model of so many layers.

        Raises:
            ValueError: It names layers that the model does not have, or has not a factor for each.
        """
        if any(not -layers <= i < layers for i in self.dense_layers):
            raise ValueError(f"dense_layers {self.dense_layers} are not all layers of a model with {layers}")
        if self.layer_budgets and len(self.layer_budgets) != layers:
            raise ValueError(f"layer_budgets has {len(self.layer_budgets)} factors, and the model has {layers} layers")

    def is_dense_layer(self, layer: int, layers: int) -> bool:
        """Tell whether a layer of a model with so many stays dense."""
        return layer in self.dense_layers or layer - layers in self.dense_layers

    def layer_config(self, config: StemConfig, layer: int, layers: int) -> StemConfig:
        """Return the config of one layer: its factor goes into `budget_scale`.

        Args:
            config: The method.
            layer: From 0 on.
            layers: Of the model.

        Raises:
            ValueError: There are `layer_budgets`, but none for this layer.
        """
        if not self.layer_budgets:
            if self.depth_decay == 1 or layers < 2 or config.keeps_everything:
                return config
            depth = min(layer / (layers - 1), 1.0)
            return _scaled(config, 2 - self.depth_decay - 2 * (1 - self.depth_decay) * depth)
        if layer >= len(self.layer_budgets):
            raise ValueError(f"layer_budgets has {len(self.layer_budgets)} factors, none for layer {layer}")
        return _scaled(config, self.layer_budgets[layer])

    @property
    def has_target(self) -> bool:
        """Whether an audit decides if a call stays sparse."""
        return self.min_recall is not None or self.max_error is not None

    def misses(self, audit: Audit) -> bool:
        """Tell whether an audit fails to show what the targets ask for."""
        # Asked this way round, a limit that is no number misses.
        recalls = self.min_recall is None or audit.recall.low >= self.min_recall
        return not (recalls and (self.max_error is None or audit.error.high <= self.max_error))

    def missed_by(self, sums: AuditSums, backend: Backend) -> bool | Tensor:
        """Tell whether audited attention misses the targets; see `misses`. Where there are none it does not.

        Args:
            sums: What the audit found.
            backend: Asked first, since it may tell on the device.

        Returns:
            bool [] on the device if the backend can tell there, so that nobody waits; otherwise a bool.
        """
        if not self.has_target:
            return False
        missed = backend.misses(sums.values, sums.queries, sums.rows, self.min_recall, self.max_error)
        return self.misses(sums.read()) if missed is None else missed

    def why_dense(
        self,
        config: StemConfig,
        calls: Sequence[tuple[int, BlockGrid]],
        told_lens: Sequence[int] | None,
        backend: Backend | None,
        geometry: Geometry,
    ) -> str | None:
        """Say why a prefill should be dense, or return None.

        Args:
            config: The layer's method.
            calls: Of every batch row with queries: tokens of the whole prompt as far as known, and the blocks.
            told_lens: Tokens of every batch row's whole prompt, where told. The whole prompt then decides, so that all
                its chunks are decided alike and chunks give what one pass gives.
            backend: What would run it, as far as known; None: nothing that says what it gains.
            geometry: What is known of the prefill; its tokens are filled in here.
        """
        if max(told_lens or [n for n, _ in calls], default=0) < self.min_seq_len:
            return "short prompt"
        told = None if told_lens is None else tuple(told_lens)
        if self.crossover and not _pays(config, tuple(calls), told, backend, geometry):
            return "no gain from sparsity"
        return None


# What is left out here stands at the field's default.
_PRESETS: dict[str, dict[str, Any]] = {
    "default-0.1": {"depth_decay": 1.0},
    "official": {"min_seq_len": 0, "dense_layers": (0, 1), "depth_decay": 1.0},
    "paper": {"min_seq_len": 8192, "depth_decay": 1.0},
}


@lru_cache(maxsize=1024)  # every call of every layer asks
def _scaled(config: StemConfig, factor: float) -> StemConfig:
    return config.scaled(factor)


@lru_cache(maxsize=4096)  # likewise, and every chunk
def _pays(
    config: StemConfig,
    calls: tuple[tuple[int, BlockGrid], ...],
    told_lens: tuple[int, ...] | None,
    backend: Backend | None,
    geometry: Geometry,
) -> bool:
    """Tell whether sparse attention is faster than dense, by the blocks that the budget lets it keep at most."""
    if backend is None:
        return False
    if calls and all(budget_of(config, (n,)).keeps_everything(grid) for n, grid in calls):
        return False  # dense gives the same
    prompts = calls if told_lens is None else tuple((n, BlockGrid(n, n, config.block_size)) for n in told_lens)
    kept = sum(int(most_kept(budget_of(config, (n,)).rows(grid), grid, config).sum()) for n, grid in prompts)
    causal = sum(grid.causal_blocks for _, grid in prompts)
    longest = max((grid.k_len for _, grid in prompts), default=0)
    return kept <= backend.break_even(dataclasses.replace(geometry, tokens=longest), config) * causal


def policy_field_names() -> tuple[str, ...]:
    """Return the names of the fields of `PrefillPolicy`."""
    return tuple(f.name for f in dataclasses.fields(PrefillPolicy))


def make_settings(fields: Mapping[str, Any], preset: str = "default") -> tuple[StemConfig, PrefillPolicy]:
    """Build a config and a policy from one set of fields: no name belongs to both.

    Args:
        fields: Fields of `StemConfig` and of `PrefillPolicy`.
        preset: What they replace.

    Raises:
        ValueError: The preset or a field is unknown, or a value is out of range.
    """
    names = policy_field_names()
    unknown = sorted(set(fields) - set(names) - set(field_names()))
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join((*field_names(), *names))}")
    config = StemConfig.preset(preset, **{name: x for name, x in fields.items() if name not in names})
    return config, PrefillPolicy.preset(preset, **{name: x for name, x in fields.items() if name in names})


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file: one JSON object of fields of `StemConfig` and `PrefillPolicy`, as `stem-attn tune` writes.

    Args:
        path: The file.

    Returns:
        The fields that the file names, as plain values; for `make_settings`.

    Raises:
        ValueError: It cannot be read, is no JSON object, or has a field that is unknown or out of range.
    """
    try:
        text = path.expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"cannot read settings file {path}: {reason}") from error
    return parse_settings(text, f"settings file {path}")


def parse_settings(text: str, name: str) -> dict[str, Any]:
    """Read the text of a settings file; see `read_settings`.

    Args:
        text: One JSON object.
        name: What the text is called in errors.

    Raises:
        ValueError: It is no JSON object, or has a field that is unknown or out of range.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(fields).__name__}")
    try:
        make_settings(fields)  # says what is wrong with it, if anything
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return fields
