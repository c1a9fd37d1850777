"""Make the attention implementation "stem" known to transformers."""

from __future__ import annotations

import copyreg
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from stem_attn.integrations.hf.forward import run_bare_name, stem_attention_forward
from stem_attn.integrations.hf.masks import stem_mask
from stem_attn.integrations.hf.state import State

NAME = "stem"


def register() -> None:
    """Make `attn_implementation="stem"` known to transformers, with the default config.

    Prefer `enable`. A model loaded with the bare name is not checked: some architectures take the name, never call the
    function and lose their masks, which is silently wrong. It has no stats and no prompt length either.
    """
    make_known()
    run_bare_name()


def make_known() -> None:
    """Register the name for models that `enable` has checked."""
    AttentionInterface.register(NAME, stem_attention_forward)
    AttentionMaskInterface.register(NAME, stem_mask)


def _revive() -> State:
    # A model is copied or unpickled, maybe in a process where nothing is registered yet.
    make_known()
    return State.__new__(State)


def _reduce(state: State) -> tuple[Any, ...]:
    return _revive, (), state.__getstate__()


copyreg.pickle(State, _reduce)
