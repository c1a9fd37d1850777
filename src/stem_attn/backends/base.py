"""What a backend is: attention over a selection, and where it can, a faster way to make the selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from stem_attn.blocks import BlockSelection
from stem_attn.budget import Budget
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.exact_rows import add_up, compare_rows
from stem_attn.layout import Part
from stem_attn.residual import add_means
from stem_attn.scoring import row_scores
from stem_attn.selection import select_rows
from stem_attn.workers import on_worker


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is known of a prefill before there are tensors.

    Args:
        device_type: `torch.device.type`.
        dtype: Of q, k and v.
        head_dim: The larger of q's and v's.
        tokens: Keys of the longest sequence.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    tokens: int


class PreparedCall(Protocol):
    """A paged call, to be made again.

    Only with tensors that differ from the first ones in their addresses, and those by multiples of 16 bytes; with the
    same sequences, scale and softcap; on the same thread. It looks at nothing but the config, the stream and whether a
    graph is being captured.
    """

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, config: StemConfig
    ) -> list[Tensor] | None:
        """Select blocks and attend over them.

        Args:
            q: [T, Hq, D].
            k: [pages, page_size, Hkv, D].
            v: [pages, page_size, Hkv, Dv].
            sinks: [Hq], if the first call had any.
            out: [T, Hq, Dv]; written.
            config: The method.

        Returns:
            What every sequence keeps, int32 [1, Hq, Qb], to be read only; or None: it must be called as the first was,
            and nothing is done.
        """


class Backend(ABC):
    """Select blocks and compute exact attention over them on some kind of device.

    Calls reach a backend checked, and selections fit them. `why_*` methods return None for yes, and otherwise the
    reason as a clause.
    """

    name: ClassVar[str]
    automatic_on: ClassVar[tuple[str, ...]] = ()
    """Types of devices on which automatic choice tries this backend; `"*"` stands for all."""
    selector: ClassVar[str | None] = None
    """Name of the backend that makes this one's selections; None: it makes its own."""

    def why_unavailable(self) -> str | None:
        """Say why this machine cannot run the backend at all (a missing package or device)."""
        return None

    def why_unsupported(self, call: Call) -> str | None:
        """Say why the backend cannot take this call, one of its parts or one of its properties."""
        return None

    def how(self) -> str | None:
        """Say, after "it runs", which of several ways this machine's calls take; None: there is only one."""
        return None

    def break_even(self, geometry: Geometry, config: StemConfig) -> float:
        """Return the density up to which a whole sparse prefill, selection included, is faster than a dense one.

        Told before there are tensors, so that an adapter can decide. What it rests on was measured on some machine,
        which the implementation names.

        Args:
            geometry: The prefill.
            config: The method.

        Returns:
            From 0, never faster, to 1.
        """
        return 0.0

    def select(self, call: Call, part: Part, config: StemConfig, budget: Budget) -> BlockSelection:
        """Score the blocks of a part and keep the best; in plain torch unless a backend overrides it.

        Args:
            call: The call.
            part: One of its parts.
            config: The method.
            budget: How many blocks the rows of the part's prompts may keep.
        """
        k, v = part.gather()
        grid, (batch, heads), device = call.grid(part), part.q.shape[:2], part.q.device

        def select() -> BlockSelection:
            start, step = row_scores(part.q, k, v, config, call.scale, call.softcap, call.sinks)
            return select_rows(start, step, budget.rows(grid), grid, config, batch, heads, k.shape[1], device)

        return on_worker(select, device)

    @abstractmethod
    def attend(self, call: Call, selections: Sequence[BlockSelection], out: Tensor, lse: Tensor | None) -> None:
        """Attend over the kept blocks.

        Args:
            call: The call.
            selections: The kept blocks of every part.
            out: [B, Hq, T, Dv] in q's dtype, any strides but the last, which is 1; written.
            lse: float32 [B, Hq, T], contiguous, for the natural log-sum-exp of the logits; written. None: not wanted.
        """

    def prepare(self, call: Call, config: StemConfig, out: Tensor) -> PreparedCall | None:
        """Work out what the layers of a model share that make a call one after the other.

        Args:
            call: A paged call, checked. One that differs in its tensors' addresses and its budget only has been made.
            config: The method.
            out: As in `attend`.

        Returns:
            What makes it again, on the current stream; or None: nothing is gained.
        """
        return None

    def compare_rows(self, call: Call, part: Part, selection: BlockSelection, out: Tensor, places: Tensor) -> Tensor:
        """Attend exactly with some rows, for an audit; in plain torch unless a backend overrides it.

        Nothing is asked back from the device.

        Args:
            call: The call.
            part: One of its parts.
            selection: The part's kept blocks.
            out: [B, Hq, Tq, Dv], what came out of the part; last stride 1.
            places: int64 [B, Hq, R]; which of the part's queries.

        Returns:
            Float32 or wider [3, B, Hq, R]: of every row the share of its exact attention that falls on kept blocks
            (what a sink takes is no part of it), and `|out - exact|^2` and `|exact|^2` of its output.
        """
        return compare_rows(call, part, selection, out, places)

    def add_up(self, found: Tensor, q_len: int) -> Tensor:
        """Add up what `compare_rows` found, for an audit; in plain torch unless a backend overrides it.

        Args:
            found: [3, B, Hq, R], contiguous. Every head's rows lie two by two in R / 2 equal stretches of the queries.
            q_len: Queries of a head.

        Returns:
            float64 [7], see `AuditSums`.
        """
        return add_up(found, q_len)

    def misses(
        self, sums: Tensor, queries: int, rows: int, min_recall: float | None, max_error: float | None
    ) -> Tensor | None:
        """Tell on the device whether an audit's sums fail to show what is asked for; None: the host must read them.

        Args:
            sums: See `AuditSums`, as the next two.
            queries: Likewise.
            rows: Likewise.
            min_recall: What the recall's lower limit must reach, or None.
            max_error: What the error's upper limit may be, or None.

        Returns:
            bool [] on the device of the sums.
        """
        return None

    def attend_if(self, call: Call, wanted: Tensor, out: Tensor) -> None:
        """Attend over all blocks if a flag on the device says so, and otherwise leave the output as it is.

        This waits for the flag unless a backend overrides it.

        Args:
            call: The call.
            wanted: bool [] on the call's device.
            out: As in `attend`.
        """
        if wanted:
            self.attend(call, self._everything(call), out, None)

    def _everything(self, call: Call) -> list[BlockSelection]:
        batch, heads = call.q.shape[:2]
        device = call.q.device
        return [
            BlockSelection.everything(batch=batch, heads=heads, grid=call.grid(part), device=device)
            for part in call.parts
        ]


class BlockedBackend(Backend):
    """A backend that attends to one part at a time, over keys and values that are not in pages.

    The means of pruned blocks (`residual="mean"`) are merged in plain torch.
    """

    @abstractmethod
    def attend_part(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """Attend within one part, [B, H, tokens, dim] each; the arguments are those of `attend`."""

    def attend(self, call: Call, selections: Sequence[BlockSelection], out: Tensor, lse: Tensor | None) -> None:
        for part, selection in zip(call.parts, selections, strict=True):
            k, v = part.gather()
            part_out = out[:, :, part.tokens]
            part_lse = None if lse is None else lse[:, :, part.tokens]
            if call.residual == "none":
                self.attend_part(call, part.q, k, v, selection, part_out, part_lse)
            else:
                self._attend_with_means(call, part.q, k, v, selection, part_out, part_lse)

    def _attend_with_means(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        # In float32, so that half precisions are rounded once: after the merge.
        if q.dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        kept = torch.empty(out.shape, dtype=q.dtype, device=q.device)
        kept_lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        self.attend_part(call, q, k, v, selection, kept, kept_lse)
        add_means(q, k, v, selection, kept, kept_lse, means_dtype=call.q.dtype, scale=call.scale, softcap=call.softcap)
        out.copy_(kept)
        if lse is not None:
            lse.copy_(kept_lse)
