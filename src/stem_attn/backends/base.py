"""What a backend is: attention over a selection, and where it can, a faster way to make the selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.config import Residual, StemConfig
from stem_attn.residual import add_means
from stem_attn.scoring import row_scores
from stem_attn.selection import select_rows
from stem_attn.workers import on_worker


class Backend(ABC):
    """Select blocks and compute exact attention over them on some kind of device.

    Inputs reach a backend validated: shapes, dtypes and devices agree, heads divide, `Tq <= Tk`, and the selection
    fits. `why_*` methods return None for yes, and otherwise the reason as a clause.
    """

    name: str
    selector: str | None = None
    """Name of the backend that makes this one's selections; None: it makes its own."""

    def why_unavailable(self) -> str | None:
        """Say why this machine cannot run the backend at all (a missing package or device)."""
        return None

    @abstractmethod
    def why_unsupported(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        block_size: int,
        window: int | None,
        residual: Residual = "none",
    ) -> str | None:
        """Say why the backend cannot take these inputs."""

    @abstractmethod
    def suits(self, q: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> bool:
        """Tell whether automatic choice should try this backend: the fastest known for such inputs."""

    def select(
        self, q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig, scale: float, budget: Tensor
    ) -> BlockSelection:
        """Score the blocks and keep the best; in plain torch unless a backend overrides it.

        Args:
            q: [B, Hq, Tq, D], any strides.
            k: [B, Hkv, Tk, D].
            v: [B, Hkv, Tk, Dv].
            config: The method.
            scale: Factor of the logits.
            budget: int32 [Qb] or [B, Qb] on the CPU; blocks, not yet clipped to the causal ones.
        """
        grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)

        def select() -> BlockSelection:
            start, step = row_scores(q, k, v, config, scale)
            heads = (q.shape[1], k.shape[1])
            return select_rows(start, step, budget, grid, config, q.shape[0], *heads, q.device)

        return on_worker(select, q.device)

    def select_paged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        k_len: int,
        *,
        config: StemConfig,
        scale: float,
        budget: Tensor,
    ) -> BlockSelection:
        """Do as `select` for one sequence that is kept in pages; gathers it unless overridden.

        Args:
            q: [1, Hq, Tq, D].
            k: [pages, Hkv, page_size, D]; the last stride is 1.
            v: [pages, Hkv, page_size, Dv], likewise.
            pages: int32, contiguous; the page of every page_size tokens of the sequence. Past its end may stand
                anything.
            k_len: Tokens of the sequence.
            config: The method.
            scale: Factor of the logits.
            budget: int32 [Qb] on the CPU.
        """
        k, v = (gather_pages(x, pages, k_len) for x in (k, v))
        return self.select(q, k, v, config=config, scale=scale, budget=budget)

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        *,
        scale: float,
        window: int | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the kept blocks.

        Args:
            q: [B, Hq, Tq, D], any strides.
            k: [B, Hkv, Tk, D].
            v: [B, Hkv, Tk, Dv].
            selection: The kept blocks of every query block and head.
            scale: Factor of the logits.
            window: Tokens of a causal sliding window to apply inside the kept blocks, or None.
            return_lse: Whether the log-sum-exp is wanted.

        Returns:
            out [B, Hq, Tq, Dv] made by `empty_output`, and the natural log-sum-exp float32 [B, Hq, Tq] or None.
        """

    def attend_residual(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the kept blocks and the means of the pruned ones; the means in plain torch unless overridden.

        Args and result are those of `attend`; the log-sum-exp includes the means.
        """
        # In float32, so that half precisions are rounded once: after the merge.
        dtype = q.dtype
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        out, lse = self.attend(q, k, v, selection, scale=scale, window=None, return_lse=True)
        assert lse is not None
        add_means(q, k, v, selection, out, lse, scale=scale)
        return out.to(dtype), lse if return_lse else None

    def attend_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selections: Sequence[BlockSelection],
        *,
        scale: float,
        residual: Residual = "none",
    ) -> Tensor:
        """Attend within each of several sequences packed one after the other; one by one unless overridden.

        Args:
            q: [T, Hq, D], the query tokens of all sequences.
            k: [Tk, Hkv, D], the key tokens of all sequences.
            v: [Tk, Hkv, Dv].
            selections: One a sequence, each of batch 1; their lengths say where a sequence starts.
            scale: Factor of the logits.
            residual: What stands for pruned blocks.

        Returns:
            out [T, Hq, Dv] in q's dtype.
        """
        outs = []
        q_stop = k_stop = 0
        for selection in selections:
            q_start, q_stop = q_stop, q_stop + selection.q_len
            k_start, k_stop = k_stop, k_stop + selection.k_len
            q_part, k_part, v_part = (
                x[start:stop].transpose(0, 1)[None]
                for x, start, stop in ((q, q_start, q_stop), (k, k_start, k_stop), (v, k_start, k_stop))
            )
            outs.append(self._attend_one(q_part, k_part, v_part, selection, scale, residual))
        return torch.cat(outs)

    def attend_paged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_table: Tensor,
        selections: Sequence[BlockSelection],
        *,
        scale: float,
        out: Tensor,
        residual: Residual = "none",
    ) -> None:
        """Attend within each of several sequences that are kept in pages; gathers each unless overridden.

        Args:
            q: [T, Hq, D], the query tokens of all sequences, one after the other.
            k: [pages, Hkv, page_size, D]; the last stride is 1.
            v: [pages, Hkv, page_size, Dv], likewise.
            block_table: int32 [sequences, pages of the longest], last stride 1; the page of every page_size tokens of
                a sequence. Past its end may stand anything.
            selections: One a sequence, each of batch 1.
            scale: Factor of the logits.
            out: [T, Hq, Dv] in q's dtype, last stride 1; written.
            residual: What stands for pruned blocks.
        """
        q_stop = 0
        for pages, selection in zip(block_table, selections, strict=True):
            q_start, q_stop = q_stop, q_stop + selection.q_len
            query = q[q_start:q_stop].transpose(0, 1)[None]
            keys, values = (gather_pages(x, pages, selection.k_len) for x in (k, v))
            out[q_start:q_stop] = self._attend_one(query, keys, values, selection, scale, residual)

    def _attend_one(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, residual: Residual
    ) -> Tensor:
        """Attend within one sequence, [1, H, tokens, D]; returns [Tq, Hq, Dv]."""
        if residual == "mean":
            out, _ = self.attend_residual(q, k, v, selection, scale=scale, return_lse=False)
        else:
            out, _ = self.attend(q, k, v, selection, scale=scale, window=None, return_lse=False)
        return out[0].transpose(0, 1)


def gather_pages(x: Tensor, pages: Tensor, tokens: int) -> Tensor:
    """Copy a sequence out of its pages, from [pages, Hkv, page_size, D] to [1, Hkv, tokens, D]."""
    used = pages[: -(-tokens // x.shape[2])].long()
    return x[used].transpose(0, 1).flatten(1, 2)[None, :, :tokens]


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Allocate attention's output, [B, Hq, Tq, Dv] in q's dtype.

    Tokens come before heads in memory, as a model's output projection wants them, so that adapters need no copy.
    """
    batch, heads, q_len, _ = q.shape
    return torch.empty(batch, q_len, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
