"""`stem_attention_paged` for the layers of a model: what their calls share is worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stem_attn import run
from stem_attn.api import Config, PromptLen, call_of, stem_attention_paged
from stem_attn.backends.base import PreparedCall
from stem_attn.checks import resolve_config
from stem_attn.layout import Layout


class PagedPrefill:
    """Compute Stem's prefill of the same sequences in one layer of a model after another.

    Each `run` gives what `stem_attention_paged` gives. The keys and values of its tokens must be in the cache by then.
    The second run of a kind finds what is to be launched; it and later ones launch that and do nothing else, which
    takes the host about half the time. Of a kind are runs whose tensors differ in their addresses only (by multiples of
    16 bytes), and whose settings in the scale of their budgets.

    All other runs are right too, and slower: on backends other than Triton; with `residual` or `precision`; of several
    sequences off the Hopper kernel, and of three and more short ones on it (below 96 rows of all heads on average); in
    a captured graph; in a layer that keeps more blocks a row than was known of when the step's second layer ran.

    It is for one step of a server, on one stream, and for one thread at a time: it holds the memory that selection
    needs, for all layers, until it is deleted. Nothing is checked before the first run.

    Args:
        cu_seqlens_q: N + 1 rising ints from 0 to T: where each sequence's queries start and end. Give these and the
            lengths as ints: a GPU tensor is read on the host, which waits for the GPU, as often as it is needed.
        seq_lens: Tokens of each sequence in the cache, N ints; its queries are the last of them.
        block_table: int32 [N, pages of the longest]; see `stem_attention_paged`. It may not change until the last run.
        prompt_len: Tokens of each sequence's whole prompt: N ints, or one for all. Default: `seq_lens`.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
    """

    def __init__(
        self,
        *,
        cu_seqlens_q: Tensor | Sequence[int],
        seq_lens: Tensor | Sequence[int],
        block_table: Tensor,
        prompt_len: PromptLen = None,
        backend: str = "auto",
    ) -> None:
        self._sequences: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q,
            "seq_lens": seq_lens,
            "block_table": block_table,
            "prompt_len": prompt_len,
        }
        self._backend = backend
        self._key: tuple[Any, ...] | None = None  # of the last call that went the ordinary way
        self._tried = False  # to prepare such a call
        self._prepared: PreparedCall | None = None

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        config: Config = "default",
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor,
    ) -> list[Tensor]:
        """Compute one layer; see `stem_attention_paged` for what is not said here.

        Args:
            q: [T, Hq, D].
            k_cache: [pages, page_size, Hkv, D].
            v_cache: [pages, page_size, Hkv, Dv].
            config: The layer's settings.
            scale: Factor of the logits.
            softcap: What the logits' magnitude stays below.
            sinks: [Hq].
            out: [T, Hq, Dv] in q's dtype, last stride 1; written.

        Returns:
            How many blocks each row keeps: int32 [1, Hq, Qb] of every sequence. Read it only: of layers that keep
            everything it may be one tensor, which the kernels read too.

        Raises:
            ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
            RuntimeError: The named backend is not available here.
        """
        if torch.compiler.is_compiling():
            raise ValueError("PagedPrefill cannot be traced by torch.compile: call stem_attention_paged there")
        if not isinstance(out, Tensor):
            raise ValueError(f"out must be a tensor [T, Hq, Dv], got {type(out).__name__}")
        config = resolve_config(config)
        key = _key(scale, softcap, q, k_cache, v_cache, out, sinks)
        if key == self._key:
            if not self._tried:
                self._tried = True
                layout = Layout.paged(q, k_cache, v_cache, **self._sequences)
                call = call_of(layout, config, config.block_size, scale, softcap, sinks)
                self._prepared = run.prepare(call, config, self._backend, out.transpose(0, 1)[None])
            if self._prepared is not None:
                counts = self._prepared.run(q, k_cache, v_cache, sinks, out, config)
                if counts is not None:
                    return counts
        _, selections = stem_attention_paged(
            q,
            k_cache,
            v_cache,
            **self._sequences,
            config=config,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            backend=self._backend,
            out=out,
            return_selection=True,
        )
        if key != self._key:
            self._key, self._tried, self._prepared = key, False, None
        return [selection.counts for selection in selections]


def _key(scale: Any, softcap: Any, *tensors: Any) -> tuple[Any, ...]:
    """Return what calls share that differ in their tensors' addresses only.

    Kernels are compiled for multiples of 16 bytes. What should be a tensor and is none is refused by the ordinary call.
    """
    told = [
        (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) if isinstance(x, Tensor) else type(x)
        for x in tensors
    ]
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    return scale, softcap, type(scale), type(softcap), learns, *told
