"""What the adapter keeps for one model: settings, counters, and what has been logged."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stem_attn import baselines
from stem_attn.blocks import BlockSelection
from stem_attn.config import StemConfig
from stem_attn.methods import Method

log = logging.getLogger("stem_attn.hf")

ATTRIBUTE = "_stem_state"  # where a model's modules carry its State

# Reasons for dense attention that belong to normal use; every other one is logged as a warning.
_EXPECTED = frozenset({"decode", "short prompt", "dense layer", "no gain from sparsity"})

_keys = itertools.count()
_by_key: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class Stats:
    """Count a model's attention calls since `enable` or `reset_stats`; one layer of one forward is one call.

    Under torch.compile the calls that are dense by their form alone (decode, 4-D masks, training) leave no trace here,
    because counting them would break the graph.

    Args:
        method: The method's name.
        calls: All calls.
        sparse: Calls that attended over the blocks that the method selects.
        banded: Calls of sliding-window layers, exact over their window.
        dense: Calls left to dense attention, by reason; "no gain from sparsity" where sparse would not be faster.
        density: Kept over causal blocks, all sparse calls together, so that each call weighs as much as the
            work that dense attention would have had; None before the first sparse call.
        tokens: Query tokens by kind ("sparse", "banded", "dense"), padding included, summed over calls.
        unknown_prompt_len: Sparse calls with a prefix whose whole prompt length nobody told; their budget is that
            of the tokens seen so far.
    """

    method: str
    calls: int
    sparse: int
    banded: int
    dense: dict[str, int]
    density: float | None
    tokens: dict[str, int]
    unknown_prompt_len: int


class State:
    """Hold the settings and counters of one model. All its attention modules refer to the same object.

    Args:
        config: Stem's settings; of another method only `residual`, `dense_layers` and `min_seq_len`.
        prompt_len: Tokens of the whole prompt, one int or one a batch row; None if unknown.
        backend: The backend's name, or "auto".
        crossover: Whether calls of Stem that sparse attention would not speed up go dense.
        method: What selects instead of Stem; None: Stem.
        previous: (config, attention implementation) pairs to restore.
    """

    def __init__(
        self,
        config: StemConfig,
        prompt_len: PromptLen = None,
        backend: str = "auto",
        crossover: bool = True,
        method: Method | None = None,
        previous: list[tuple[Any, str | None]] | None = None,
    ) -> None:
        self.config = config
        self.prompt_len = prompt_len
        self.backend = backend
        self.crossover = crossover
        self.method = method
        self.previous = previous or []
        self._logged: set[str] = set()
        self.reset()
        self._register_key()

    def reset(self) -> None:
        """Forget all counts."""
        self._calls: Counter[str] = Counter()
        self._dense: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._unknown_prompt_len = 0
        self._causal_blocks = 0
        self._kept_blocks: dict[str, Tensor] = {}  # by device, int64, so that counting never waits for the device

    def _register_key(self) -> None:
        # A compiled graph cannot hold this object; it finds it again by number.
        self.key = next(_keys)
        _by_key[self.key] = self

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.config.block_size if self.method is None else self.method.block_size

    @staticmethod
    def by_key(key: int) -> State:
        """Return the state that a compiled graph refers to."""
        return _by_key[key]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "key"}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        # Copied or unpickled, maybe in a process where nothing is registered yet.
        from stem_attn.integrations.hf.enable import register

        self.__dict__.update(fields)
        self._register_key()
        register()

    def prompt_lens(self, batch: int) -> list[int] | None:
        """Return the whole prompt's tokens of every batch row, or None if unknown.

        Raises:
            ValueError: The lengths told are not for this batch size.
        """
        if self.prompt_len is None:
            return None
        if isinstance(self.prompt_len, int):
            return [self.prompt_len] * batch
        # Beam search repeats each row.
        repeats, rest = divmod(batch, len(self.prompt_len))
        if rest or not repeats:
            raise ValueError(f"prompt_len has {len(self.prompt_len)} rows, but the batch has {batch}")
        return [n for n in self.prompt_len for _ in range(repeats)]

    def count_selection(self, selection: BlockSelection) -> None:
        """Note the density of one sparse call, or of one batch row of it."""
        kept = selection.counts.sum()
        device = str(kept.device)
        self._kept_blocks[device] = self._kept_blocks.get(device, 0) + kept
        batch, heads, _ = selection.counts.shape
        self._causal_blocks += batch * heads * selection.grid.causal_blocks

    def count_unknown_prompt_len(self) -> None:
        """Note a sparse call with a prefix whose whole prompt length is unknown, and warn once."""
        self._unknown_prompt_len += 1
        message = "whole prompt length unknown, chunks are budgeted by the tokens seen so far: see prompt_length()"
        self._say(message, logging.WARNING)

    def count(self, kind: str, tokens: int) -> None:
        """Note one sparse or banded call of `tokens` query tokens."""
        self._calls[kind] += 1
        self._tokens[kind] += tokens

    def count_dense(self, reason: str, tokens: int) -> None:
        """Note one dense call, and log its reason if it is new for this model."""
        self.count("dense", tokens)
        self._dense[reason] += 1
        self._say(f"dense attention: {reason}", logging.INFO if reason in _EXPECTED else logging.WARNING)

    def _say(self, message: str, level: int) -> None:
        if message not in self._logged:
            self._logged.add(message)
            log.log(level, "%s (said once per model)", message)

    def stats(self) -> Stats:
        """Return the counts so far."""
        kept = sum(int(n) for n in self._kept_blocks.values())
        return Stats(
            method="stem" if self.method is None else baselines.name_of(self.method),
            calls=self._calls.total(),
            sparse=self._calls["sparse"],
            banded=self._calls["banded"],
            dense=dict(self._dense),
            density=kept / self._causal_blocks if self._causal_blocks else None,
            tokens={kind: self._tokens[kind] for kind in ("sparse", "banded", "dense")},
            unknown_prompt_len=self._unknown_prompt_len,
        )


PromptLen = int | tuple[int, ...] | None


def normalize_prompt_len(value: int | Sequence[int] | Tensor | None) -> PromptLen:
    """Check a prompt length: None, an int, or one int a batch row.

    Raises:
        ValueError: It is something else, or a length is below 1.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.tolist()
    lengths = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if not lengths or any(type(n) is not int or n < 1 for n in lengths):
        raise ValueError(f"prompt_len must be an int, or one int a batch row, of at least 1 token; got {value!r}")
    return lengths[0] if isinstance(value, int) else lengths
