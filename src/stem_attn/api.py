"""The public functions: each describes a call, once, and runs it; while torch.compile traces, as one operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from stem_attn import run, traced
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.call import Call
from stem_attn.checks import resolve_config, resolve_scale
from stem_attn.config import Precision, Residual, StemConfig
from stem_attn.layout import Layout
from stem_attn.method import Method, check_attention

Config = StemConfig | str
_DEFAULT = StemConfig()
PromptLen = int | Sequence[int] | Tensor | None


@overload
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    return_selection: Literal[False] = False,
) -> Tensor: ...


@overload
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    return_selection: Literal[True],
) -> tuple[Tensor, BlockSelection]: ...


def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, BlockSelection]:
    """Compute causal attention of a prefill over the key blocks that Stem selects.

    It does what the config says at any length. Whether sparse is worth it (short prompts, decode) is the adapters'
    decision.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens; query i sees keys `j <= i + Tk - Tq`.
        k: [B, Hkv, Tk, D]; Hkv divides Hq and is not repeated.
        v: [B, Hkv, Tk, Dv].
        config: The method's settings: a `StemConfig`, or a preset's name.
        method: Another method that selects the blocks, for instance from `stem_attn.methods.make`. Of `config` only
            `residual` and `precision` are read then.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        softcap: Above 0: a scaled logit x becomes `softcap * tanh(x / softcap)`. Default: it stays x.
        sinks: [Hq], floating: one more logit a query head in the softmax's sum, without a value. Default: none.
        prompt_len: Tokens of the whole prompt, prefix and coming chunks included: one int or one a batch row. The
            budget is computed from it. Default: Tk.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
        return_selection: Whether to return the kept blocks too.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with `return_selection` also the `BlockSelection`.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.

    Source: Stem (arXiv 2603.06274).
    """
    config = resolve_config(config)
    if torch.compiler.is_compiling():
        out, _, indices, counts = traced.prefill(
            q,
            k,
            v,
            config=_traceable(config, method),
            prompt_len=prompt_len,
            backend=backend,
            wanted="out selection" if return_selection else "out",
            scale=scale,
            residual=config.residual,
            precision=config.precision,
            softcap=softcap,
            sinks=sinks,
        )
        if not return_selection:
            return out
        return out, BlockSelection.made(indices, counts, BlockGrid(q.shape[2], k.shape[2], config.block_size))
    choice, block_size = _choice(config, method)
    layout = Layout.dense(q, k, v, prompt_len)
    call = call_of(layout, config, block_size, scale, softcap, sinks)
    out, selections = run.prefill(call, choice, backend)
    return (out, selections[0]) if return_selection else out


def select_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
) -> BlockSelection:
    """Choose the key blocks that every query block keeps.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens.
        k: [B, Hkv, Tk, D]; Hkv divides Hq.
        v: [B, Hkv, Tk, Dv]; only magnitudes are read.
        config: The method's settings: a `StemConfig`, or a preset's name.
        method: Another method that selects the blocks; nothing of `config` is read then.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        softcap: Above 0: a scaled logit x becomes `softcap * tanh(x / softcap)`. Default: it stays x.
        sinks: [Hq], floating: one more logit a query head in the softmax's sum, without a value. Default: none.
        prompt_len: Tokens of the whole prompt: one int or one a batch row, at least Tk. Default: Tk.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        The selection. Equal scores go to the lower index.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.

    Source: Stem, Eq. 3 (how many blocks) and Eq. 7 (which).
    """
    config = resolve_config(config)
    if torch.compiler.is_compiling():
        _, _, indices, counts = traced.prefill(
            q,
            k,
            v,
            config=_traceable(config, method),
            prompt_len=prompt_len,
            backend=backend,
            wanted="selection",
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        return BlockSelection.made(indices, counts, BlockGrid(q.shape[2], k.shape[2], config.block_size))
    choice, block_size = _choice(config, method, attends=False)
    layout = Layout.dense(q, k, v, prompt_len)
    call = Call(layout, block_size, resolve_scale(scale, q.shape[-1]), softcap=softcap, sinks=sinks)
    return run.select(call, choice, backend)[0]


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    residual: Residual = "none",
    precision: Precision = "auto",
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    residual: Residual = "none",
    precision: Precision = "auto",
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    residual: Residual = "none",
    precision: Precision = "auto",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend causally over the key blocks that a selection keeps.

    Args:
        q: [B, Hq, Tq, D], the last Tq of Tk tokens; query i sees keys `j <= i + Tk - Tq`.
        k: [B, Hkv, Tk, D]; Hkv divides Hq.
        v: [B, Hkv, Tk, Dv].
        selection: The kept blocks, made for these lengths.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        softcap: Above 0: a scaled logit x becomes `softcap * tanh(x / softcap)`. Default: it stays x.
        sinks: [Hq], floating: one more logit a query head in the softmax's sum, without a value. Default: none.
        window: Tokens: keep only keys `i - window < j <= i`, inside edge blocks too. Default: no window.
        residual: What stands for pruned blocks before a query's own: `"none"`, or `"mean"`: each joins as one key and
            one value, the means of its tokens, with the weight of that many. Not with a window.
        precision: Of the products: `"auto"`, that of q, k and v; or `"fp8"`: 8 bits (e4m3), on Hopper GPUs, and not
            with a residual.
        return_lse: Whether to return the log-sum-exp too.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        out [B, Hq, Tq, Dv] in q's dtype; with `return_lse` also the natural log-sum-exp of the logits, float32
        [B, Hq, Tq]: of the kept ones, of the means' with a residual, and of the sink.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.
    """
    if not isinstance(selection, BlockSelection):
        raise ValueError(f"selection must be a BlockSelection, got {type(selection).__name__}")
    lse: Tensor | None
    if torch.compiler.is_compiling():
        wanted = "out lse" if return_lse else "out"
        properties: dict[str, Any] = {  # in one piece: PyTorch 2.6 cannot trace |=
            "scale": scale, "window": window, "residual": residual, "softcap": softcap, "sinks": sinks,
            "precision": precision,
        }  # fmt: skip
        out, lse, _, _ = traced.prefill(q, k, v, selection=selection, backend=backend, wanted=wanted, **properties)
    else:
        layout, scale = Layout.dense(q, k, v), resolve_scale(scale, q.shape[-1])
        call = Call(layout, selection.block_size, scale, window, residual, softcap, sinks, precision)
        out, lse = run.attend(call, [selection], backend, return_lse=return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


@overload
def stem_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    return_selection: Literal[False] = False,
) -> Tensor: ...


@overload
def stem_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    return_selection: Literal[True],
) -> tuple[Tensor, list[BlockSelection]]: ...


def stem_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, list[BlockSelection]]:
    """Compute Stem's prefill within each of several packed sequences.

    Args:
        q: [T, Hq, D], the query tokens of all sequences.
        k: [Tk, Hkv, D], the key tokens of all sequences; Hkv divides Hq.
        v: [Tk, Hkv, Dv].
        cu_seqlens_q: N + 1 rising ints from 0 to T: where each sequence's queries start and end. A GPU tensor is
            read on the host, which waits for the GPU.
        cu_seqlens_k: The same for keys, from 0 to Tk; a sequence's queries are the last of its keys. Default: as
            for queries.
        config: The method's settings: a `StemConfig`, or a preset's name.
        method: Another method that selects the blocks. Of `config` only `residual` and `precision` are read then.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        softcap: Above 0: a scaled logit x becomes `softcap * tanh(x / softcap)`. Default: it stays x.
        sinks: [Hq], floating: one more logit a query head in the softmax's sum, without a value. Default: none.
        prompt_len: Tokens of each sequence's whole prompt, N ints, or one for all. Default: its keys.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
        return_selection: Whether to return the kept blocks too; not while torch.compile traces.

    Returns:
        out [T, Hq, Dv] in q's dtype; with `return_selection` also a `BlockSelection` of every sequence.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.
    """
    config = resolve_config(config)
    if torch.compiler.is_compiling():
        out, _, _, _ = traced.prefill(
            q,
            k,
            v,
            config=_traceable(config, method, return_selection),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            prompt_len=prompt_len,
            backend=backend,
            wanted="out",
            scale=scale,
            residual=config.residual,
            precision=config.precision,
            softcap=softcap,
            sinks=sinks,
        )
        return out
    choice, block_size = _choice(config, method)
    layout = Layout.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, prompt_len)
    call = call_of(layout, config, block_size, scale, softcap, sinks)
    out, selections = run.prefill(call, choice, backend)
    out = out[0].transpose(0, 1)
    return (out, selections) if return_selection else out


@overload
def stem_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    block_table: Tensor,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_selection: Literal[False] = False,
) -> Tensor: ...


@overload
def stem_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    block_table: Tensor,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_selection: Literal[True],
) -> tuple[Tensor, list[BlockSelection]]: ...


def stem_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    block_table: Tensor,
    config: Config = "default",
    method: Method | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prompt_len: PromptLen = None,
    backend: str = "auto",
    out: Tensor | None = None,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, list[BlockSelection]]:
    """Compute Stem's prefill within each of several sequences over a paged cache of keys and values.

    The Triton backend reads the cache through the block table; the others gather one sequence at a time. Nothing is
    asked back from the device where lengths are given on the host.

    Args:
        q: [T, Hq, D], the query tokens of all sequences, one after the other. Their keys and values are in the cache.
        k_cache: [pages, page_size, Hkv, D]; Hkv divides Hq. A view with any strides but the last, which is 1.
        v_cache: [pages, page_size, Hkv, Dv], likewise.
        cu_seqlens_q: N + 1 rising ints from 0 to T: where each sequence's queries start and end. A GPU tensor is
            read on the host, which waits for the GPU; so are the lengths below.
        seq_lens: Tokens of each sequence in the cache, N ints; its queries are the last of them.
        block_table: int32 [N, pages of the longest]; the page of every page_size tokens of a sequence. What lies past
            a sequence's end, in the table and in its last page, is not read.
        config: The method's settings: a `StemConfig`, or a preset's name. A block may be smaller or larger than a page.
        method: Another method that selects the blocks, from gathered keys and values. Of `config` only `residual` and
            `precision` are read then.
        scale: Factor of the logits; default `1 / sqrt(D)`.
        softcap: Above 0: a scaled logit x becomes `softcap * tanh(x / softcap)`. Default: it stays x.
        sinks: [Hq], floating: one more logit a query head in the softmax's sum, without a value. Default: none.
        prompt_len: Tokens of each sequence's whole prompt, coming chunks included: N ints, or one for all. Default:
            `seq_lens`.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.
        out: [T, Hq, Dv] in q's dtype, last stride 1, to write to; not while torch.compile traces. Default: a new
            tensor.
        return_selection: Whether to return the kept blocks too; not while torch.compile traces.

    Returns:
        out [T, Hq, Dv] in q's dtype; with `return_selection` also a `BlockSelection` of every sequence.

    Raises:
        ValueError: The inputs do not fit together, ask for gradients, or the named backend cannot take them.
        RuntimeError: The named backend is not available here.

    Source: Stem (arXiv 2603.06274); paging as in PagedAttention (arXiv 2309.06180).
    """
    config = resolve_config(config)
    if torch.compiler.is_compiling():
        made, _, _, _ = traced.prefill(
            q,
            k_cache,
            v_cache,
            config=_traceable(config, method, return_selection or out is not None),
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_table=block_table,
            prompt_len=prompt_len,
            backend=backend,
            wanted="out",
            scale=scale,
            residual=config.residual,
            precision=config.precision,
            softcap=softcap,
            sinks=sinks,
        )
        return made
    choice, block_size = _choice(config, method)
    layout = Layout.paged(q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, prompt_len)
    call = call_of(layout, config, block_size, scale, softcap, sinks)
    shape = (*q.shape[:2], v_cache.shape[3])
    if out is None:
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
    elif out.shape != shape or out.dtype != q.dtype or out.device != q.device or out.stride(2) != 1:
        raise ValueError(
            f"out must be {q.dtype} {list(shape)} on {q.device} with a last stride of 1, got {out.dtype} "
            f"{list(out.shape)} on {out.device} with strides {out.stride()}"
        )
    _, selections = run.prefill(call, choice, backend, out.transpose(0, 1)[None])
    return (out, selections) if return_selection else out


def _choice(config: StemConfig, method: Method | None, *, attends: bool = True) -> tuple[StemConfig | Method, int]:
    """Return who chooses blocks, and of how many tokens; `attends`: whether attention over them follows."""
    if method is None:
        return config, config.block_size
    if not callable(getattr(method, "select", None)) or type(getattr(method, "block_size", None)) is not int:
        raise ValueError(f"method must have block_size and select(q, k, v), got {type(method).__name__}")
    if dataclasses.replace(config, residual="none", precision="auto") != _DEFAULT:
        raise ValueError(
            "with another method, config gives residual and precision only: "
            "set the method's own fields where it is made"
        )
    if attends:
        check_attention(method, config)
    return method, method.block_size


def _traceable(config: StemConfig, method: Method | None, untraceable: bool = False) -> StemConfig:
    """Return the config of a call that torch.compile can trace.

    Raises:
        ValueError: It cannot.
    """
    if method is not None:
        raise ValueError("method cannot be traced by torch.compile: select its blocks before the compiled part")
    if untraceable:
        raise ValueError("return_selection and out of packed and paged calls cannot be traced by torch.compile")
    return config


def call_of(
    layout: Layout,
    config: StemConfig,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Call:
    """Make a call whose attention is what a config asks for."""
    scale = resolve_scale(scale, layout.q.shape[-1])
    residual, precision = config.residual, config.precision
    return Call(layout, block_size, scale, softcap=softcap, sinks=sinks, residual=residual, precision=precision)
