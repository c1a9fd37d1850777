"""The contenders: every dense and sparse kernel a user could pick, each ready to run on one problem.

What cannot run here raises `UnavailableError` with the reason, which the report lists.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from stem_attn import backends
from stem_attn.api import block_sparse_attention, select_blocks, stem_attention
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.checks import resolve_scale
from stem_attn.config import StemConfig
from stem_attn.lab.timing import Work
from stem_attn.layout import Layout

Part = Literal["dense", "attention", "selection", "whole"]


class UnavailableError(Exception):
    """A contender cannot run here; the text says why."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to check and time.

    Args:
        name: Of the kernel, as on the command line.
        part: `"dense"` attention over every causal key, `"attention"` over the given selection, the `"selection"`
            alone, or the `"whole"` operation.
        run: Computes the output, or the selection.
        run_with_selection: For the whole operation: returns what it selected too.
        plain: Whether it computes without the problem's softcap and sinks, in the precision of the inputs.
    """

    name: str
    part: Part
    run: Work
    run_with_selection: Callable[[], tuple[Tensor, BlockSelection]] | None = None
    plain: bool = True


@dataclass(frozen=True, slots=True)
class Problem:
    """The inputs that all contenders of a case share.

    With a softcap, sinks or a precision of the config's, backends run without and with them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    config: StemConfig
    selection: BlockSelection
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def suffix(self) -> str:
        """What is added to the name of a backend that runs with them; empty where there are none."""
        precision = self.config.precision
        named = {"softcap": self.softcap is not None, "sinks": self.sinks is not None, precision: precision != "auto"}
        return "".join(f" {name}" for name, wanted in named.items() if wanted)


def names() -> list[str]:
    """Return the names of all contenders, available or not."""
    return [*_OTHERS, *backends.names()]


def variants(name: str, problem: Problem) -> Iterator[tuple[str, Callable[[], list[Contender]]]]:
    """Name what runs under a contender's name: a backend of the package's plain, then with all that the problem asks.

    Returns:
        What each is called, and what prepares it: a kernel alone, or all parts of a backend. That raises
        `UnavailableError` where it cannot run this problem on this machine.
    """
    if name in _OTHERS:
        part, prepare = _OTHERS[name]
        yield name, lambda: [Contender(name, part, prepare(problem))]
        return
    plain = dataclasses.replace(problem, config=dataclasses.replace(problem.config, precision="auto"))
    yield name, lambda: _backend(name, plain, {}, "")
    if problem.suffix:
        properties = {"softcap": problem.softcap, "sinks": problem.sinks}
        yield name + problem.suffix, lambda: _backend(name, problem, properties, problem.suffix)


def _backend(name: str, p: Problem, properties: dict[str, Any], suffix: str) -> list[Contender]:
    """Attention, selection and the whole operation on one of the package's backends."""
    reason = backends.available()[name]
    if reason:
        raise UnavailableError(reason)
    try:
        layout, scale = Layout.dense(p.q, p.k, p.v), resolve_scale(None, p.q.shape[3])
        call = Call(layout, p.config.block_size, scale, precision=p.config.precision, **properties)
        backends.selector_of(backends.for_call(name, call), call)
    except (ValueError, RuntimeError) as error:  # RuntimeError: of what makes its selections
        raise UnavailableError(str(error)) from error
    how: dict[str, Any] = {"backend": name, **properties}
    whole: dict[str, Any] = {"config": p.config, **how}
    label, plain = name + suffix, not suffix

    def attend() -> Tensor:
        return block_sparse_attention(  # type: ignore[no-any-return]
            p.q, p.k, p.v, p.selection, precision=p.config.precision, **how
        )

    return [
        Contender(label, "attention", attend, plain=plain),
        Contender(label, "selection", lambda: select_blocks(p.q, p.k, p.v, **whole), plain=plain),
        Contender(
            label,
            "whole",
            lambda: stem_attention(p.q, p.k, p.v, **whole),
            lambda: stem_attention(p.q, p.k, p.v, **whole, return_selection=True),
            plain=plain,
        ),
    ]


def _sdpa(p: Problem) -> Work:
    """Torch's own choice of dense SDPA."""
    if p.q.is_cuda:
        raise UnavailableError("on CUDA the kernels of SDPA are measured by name: fa2, cudnn")
    if p.q.shape[2] == p.k.shape[2]:
        return lambda: F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True)
    mask = torch.ones(p.q.shape[2], p.k.shape[2], dtype=torch.bool).tril(p.k.shape[2] - p.q.shape[2])
    return lambda: F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=mask, enable_gqa=True)


def _fa2(p: Problem) -> Work:
    """FlashAttention-2, the copy inside torch."""
    mask = causal_lower_right(p.q.shape[2], p.k.shape[2])

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=mask, enable_gqa=True)

    return _only_on_cuda(p, run)


def _cudnn(p: Problem) -> Work:
    """CuDNN's attention, through torch."""
    if p.q.shape[2] != p.k.shape[2]:
        raise UnavailableError("SDPA's causal mask for cuDNN starts at the first key: no prefix")

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True)

    return _only_on_cuda(p, run)


def _only_on_cuda(p: Problem, run: Work) -> Work:
    """Refuse what torch's kernel refuses, with torch's reason."""
    if not p.q.is_cuda:
        raise UnavailableError("needs a CUDA device")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            said = [str(w.message).split(" (Triggered")[0] for w in caught]
            raise UnavailableError("; ".join([str(error).splitlines()[0], *said])) from error
    return run


def _fa4_dense(p: Problem) -> Work:
    """Dense FlashAttention-4; it takes [B, T, H, D]."""
    if not p.q.is_cuda:
        raise UnavailableError("needs a CUDA device")
    try:
        attend = importlib.import_module("flash_attn.cute").flash_attn_func
    except ImportError as error:
        raise UnavailableError(f"flash-attn-4 is not installed ({error})") from error
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))

    def run() -> Tensor:
        out = attend(q, k, v, causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return run


def _flex(p: Problem) -> Work:
    """FlexAttention with the kept blocks as its block mask: full ones unmasked, the diagonal ones causal."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    grid = p.selection.grid
    if grid.offset % grid.block_size:
        raise UnavailableError("its query blocks start at the first query, which is inside a block here")
    offset = grid.offset
    rows = p.selection.counts.shape
    # Its index lists are as wide as there are key blocks.
    width = grid.k_blocks
    full = F.pad(p.selection.indices.clamp(min=0), (0, width - p.selection.indices.shape[-1]))
    diagonal = torch.zeros(*rows, width, dtype=torch.int32, device=p.q.device)
    diagonal[..., 0] = grid.block_ids(p.q.device).int()

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + offset >= kv_idx

    mask = BlockMask.from_kv_blocks(
        torch.ones(rows, dtype=torch.int32, device=p.q.device),
        diagonal,
        (p.selection.counts - 1).contiguous(),
        full,
        BLOCK_SIZE=grid.block_size,
        mask_mod=causal,
        seq_lengths=(grid.q_len, grid.k_len),
        compute_q_blocks=False,
    )
    torch._dynamo.reset()  # the lengths are compiled in, and a process may hold only a few versions
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(p.q, p.k, p.v, block_mask=mask, enable_gqa=True)


_OTHERS: dict[str, tuple[Part, Callable[[Problem], Work]]] = {
    "sdpa": ("dense", _sdpa),
    "fa2": ("dense", _fa2),
    "cudnn": ("dense", _cudnn),
    "fa4-dense": ("dense", _fa4_dense),
    "flex": ("attention", _flex),
}
