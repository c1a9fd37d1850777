"""One call as a value: what attention is asked for, checked once, whatever its layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.checks import check_residual, check_sinks, check_softcap, check_window, shape_of
from stem_attn.config import Precision, Residual, check_precision
from stem_attn.layout import Layout, Part


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Causal attention of a prefill over some of its blocks.

    A property of attention is a field here. To add one: this class, the reference, the kernels that compute it, the
    public functions' keywords, and the schema of `traced.prefill`.

    Args:
        layout: Queries, keys and values, and where they lie.
        block_size: Tokens a block.
        scale: Factor of the logits.
        window: Tokens: keep only keys `i - window < j <= i` of query i, inside edge blocks too. None: no window.
        residual: What stands for pruned blocks before a query's own.
        softcap: What the logits' magnitude stays below: a scaled logit x becomes `softcap * tanh(x / softcap)`, before
            any mask. None: no softcap.
        sinks: [Hq] in any floating dtype: of every query head one more logit in the softmax's
            sum, which has no value and neither scale nor softcap. The log-sum-exp includes it. -inf is no sink; NaN and
            inf make NaN of the head's output, as softmax does, and of no other's. None: no sinks.
        precision: Of the products: `"auto"`, that of q, k and v; or `"fp8"`, 8 bits (e4m3).

    Raises:
        ValueError: A property is out of its range, or two exclude each other.
    """

    layout: Layout
    block_size: int
    scale: float
    window: int | None = None
    residual: Residual = "none"
    softcap: float | None = None
    sinks: Tensor | None = None
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check_window(self.window)
        check_residual(self.residual, self.window)
        check_softcap(self.softcap)
        check_sinks(self.sinks, self.q)
        check_precision(self.precision, self.residual)

    @property
    def q(self) -> Tensor:
        """[B, Hq, T, D], the queries of all parts."""
        return self.layout.q

    @property
    def k(self) -> Tensor:
        """[B, Hkv, Tk, D], or [pages, Hkv, page_size, D]."""
        return self.layout.k

    @property
    def v(self) -> Tensor:
        """[B, Hkv, Tk, Dv], or [pages, Hkv, page_size, Dv]."""
        return self.layout.v

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sequences, those of equal lengths together."""
        return self.layout.parts

    def grid(self, part: Part) -> BlockGrid:
        """Return the blocks of a part."""
        return BlockGrid(part.q_len, part.k_len, self.block_size)

    def new_output(self) -> Tensor:
        """Allocate the output, [B, Hq, T, Dv] in q's dtype.

        Tokens come before heads in memory, as a model's output projection wants them, so that adapters need no copy.
        """
        batch, heads, tokens, _ = self.q.shape
        shape = batch, tokens, heads, self.v.shape[3]
        return torch.empty(shape, dtype=self.q.dtype, device=self.q.device).transpose(1, 2)

    def new_lse(self) -> Tensor:
        """Allocate the log-sum-exp, float32 [B, Hq, T]."""
        return torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)

    def check_selection(self, part: Part, selection: BlockSelection) -> None:
        """Check that a selection was made for a part: its lengths, rows and device.

        Raises:
            ValueError: It was not.
        """
        if not isinstance(selection, BlockSelection):
            raise ValueError(f"selection must be a BlockSelection, got {type(selection).__name__}")
        if (selection.q_len, selection.k_len) != (part.q_len, part.k_len):
            raise ValueError(
                f"selection is for q_len={selection.q_len}, k_len={selection.k_len}; "
                f"q and k have {part.q_len} and {part.k_len} tokens"
            )
        rows = (part.q.shape[0], part.q.shape[1], self.grid(part).q_blocks)
        if tuple(selection.counts.shape) != rows:
            raise ValueError(f"selection must have rows [B, Hq, Qb] = {list(rows)}, got {shape_of(selection.counts)}")
        if selection.counts.device != part.q.device:
            raise ValueError(f"selection must be on q's device {part.q.device}, got {selection.counts.device}")
