"""What the adapter keeps for one model: its settings and counters."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from stem_attn.config import StemConfig
from stem_attn.integrations.hf.configs import Swap
from stem_attn.integrations.hf.counters import Counters
from stem_attn.integrations.hf.told import PromptLen, find, per_row
from stem_attn.method import Method
from stem_attn.policy import PrefillPolicy

ATTRIBUTE = "_stem_state"  # where a model's modules carry its State

_keys = itertools.count()
_by_key: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


class State:
    """Hold the settings and counters of one model. All its attention modules refer to the same object.

    Args:
        config: Stem's settings; of another method only `residual` and `precision`.
        policy: Which prompts and layers are sparse.
        prompt_len: Tokens of the whole prompt where no block tells them, one int or one a batch row; None if unknown.
        backend: The backend's name, or "auto".
        method: What selects instead of Stem; None: Stem.
        swap: The configs that the model had, and its own.
        layers: Of the model; 0 where nobody knows, and then no budget depends on it.
    """

    def __init__(
        self,
        config: StemConfig,
        policy: PrefillPolicy,
        prompt_len: PromptLen = None,
        backend: str = "auto",
        method: Method | None = None,
        swap: Swap | None = None,
        layers: int = 0,
    ) -> None:
        self.config = config
        self.policy = policy
        self.prompt_len = prompt_len
        self.backend = backend
        self.method = method
        self.swap = swap or []
        self.layers = layers
        self.counters = Counters()
        self._take_key()

    def _take_key(self) -> None:
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
        return {name: value for name, value in vars(self).items() if name != "key"}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields)
        self._take_key()

    def implementation_before(self, config: Any) -> str | None:
        """Return the attention implementation that a part of the model had before, told by the part's config."""
        return next((shared._attn_implementation for shared, own in self.swap if own is config), None)

    def prompt_lens(self, batch: int, layer: int | None, *, fresh: bool) -> list[int] | None:
        """Return the whole prompt's tokens of every batch row of a call, or None if unknown.

        Args:
            batch: Rows.
            layer: The layer's index.
            fresh: Whether the call begins a prompt.

        Raises:
            ValueError: The lengths told are not for this batch size.
        """
        told = find(self.key, layer, fresh=fresh)
        return per_row(self.prompt_len if told is None else told, batch)
