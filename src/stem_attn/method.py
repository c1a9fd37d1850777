"""What a method of sparse attention is: a choice of key blocks. Stem is one; `stem_attn.methods` has the others.

Methods differ in their selection only. Every one of them runs on the same attention backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from stem_attn.blocks import BlockSelection
from stem_attn.config import StemConfig

_DEFAULT = StemConfig()


class Method(Protocol):
    """Choose key blocks for the queries of a prefill."""

    @property
    def block_size(self) -> int:
        """Tokens a block."""

    def select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        prompt_len: int | Sequence[int] | Tensor | None = None,
    ) -> BlockSelection:
        """Choose the key blocks that every query block keeps.

        Args:
            q: [B, Hq, Tq, D], the last Tq of Tk tokens.
            k: [B, Hkv, Tk, D]; Hkv divides Hq.
            v: [B, Hkv, Tk, Dv].
            scale: Factor of the logits; default `1 / sqrt(D)`.
            prompt_len: Tokens of the whole prompt, one int or one a batch row, for methods whose budget depends on
                it. Default: Tk.
        """


def check_attention(method: Method, asked: StemConfig) -> None:
    """Check that a method's own config asks for no other attention than it gets: a method only chooses blocks.

    Args:
        method: The method.
        asked: Whose `residual` and `precision` attention has.

    Raises:
        ValueError: The method has a config with another one.
    """
    own = getattr(method, "config", None)
    if not isinstance(own, StemConfig):
        return
    for name in ("residual", "precision"):
        mine, given = getattr(own, name), getattr(asked, name)
        if mine not in (getattr(_DEFAULT, name), given):
            raise ValueError(
                f"the method's config asks for {name}={mine!r}, which attention does not read there; config says "
                f"{given!r}: pass config=StemConfig({name}={mine!r}) beside the method"
            )
