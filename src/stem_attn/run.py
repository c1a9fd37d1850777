"""A call from its description to its output: choose a backend once, then budget, select, attend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stem_attn import backends
from stem_attn.audit import AuditSums
from stem_attn.audit import audit as audit_rows
from stem_attn.backends.base import Backend, PreparedCall
from stem_attn.blocks import BlockSelection
from stem_attn.budget import budget_of
from stem_attn.call import Call
from stem_attn.config import StemConfig
from stem_attn.layout import Part
from stem_attn.method import Method


def prefill(
    call: Call, choice: StemConfig | Method, backend: str, out: Tensor | None = None
) -> tuple[Tensor, list[BlockSelection]]:
    """Select blocks and attend over them.

    Args:
        call: The call.
        choice: Stem's config, or another method.
        backend: `"auto"` or a backend's name.
        out: [B, Hq, T, Dv] in q's dtype to write to, last stride 1; None: a new tensor.

    Returns:
        The output, and the kept blocks of every part.
    """
    chosen = backends.for_call(backend, call)
    selections = _select(call, choice, chosen)
    out = call.new_output() if out is None else out
    chosen.attend(call, selections, out, None)
    return out, selections


def prepare(call: Call, config: StemConfig, backend: str, out: Tensor) -> PreparedCall | None:
    """Work out what the layers of a model share that make a call one after the other; see `Backend.prepare`."""
    return backends.for_call(backend, call, again=True).prepare(call, config, out)


def select(call: Call, choice: StemConfig | Method, backend: str) -> list[BlockSelection]:
    """Choose the kept blocks of every part; see `prefill`."""
    return _select(call, choice, backends.for_call(backend, call))


def attend(
    call: Call, selections: Sequence[BlockSelection], backend: str, *, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend over blocks that were chosen before.

    Args:
        call: The call.
        selections: One a part.
        backend: `"auto"` or a backend's name.
        return_lse: Whether the log-sum-exp is wanted.

    Returns:
        The output, and the log-sum-exp, float32 [B, Hq, T], or None.
    """
    for part, selection in zip(call.parts, selections, strict=True):
        call.check_selection(part, selection)
    chosen = backends.for_call(backend, call)
    out = call.new_output()
    lse = call.new_lse() if return_lse else None
    chosen.attend(call, selections, out, lse)
    return out, lse


def audit(
    call: Call, selections: Sequence[BlockSelection], out: Tensor, backend: Backend, *, rows: int, seed: int
) -> AuditSums:
    """Attend exactly with some query rows of a call, and compare; see `stem_attn.audit.audit`.

    Args:
        call: The call, which has run.
        selections: Of every part what it kept.
        out: Its output.
        backend: That computes the audit; `backends.for_call(..., again=True)` finds the call's.
        rows: To sample.
        seed: Decides which.
    """
    return audit_rows(call, selections, out, rows=rows, seed=seed, compare=backend.compare_rows, add_up=backend.add_up)


def _select(call: Call, choice: StemConfig | Method, attender: Backend) -> list[BlockSelection]:
    if isinstance(choice, StemConfig):
        selector = backends.selector_of(attender, call)
        return [_select_part(call, part, choice, selector) for part in call.parts]
    selections = []
    for part in call.parts:
        prompt_len = part.prompt_lens[0] if len(part.prompt_lens) == 1 else part.prompt_lens
        selection = choice.select(part.q, *part.gather(), scale=call.scale, prompt_len=prompt_len)
        call.check_selection(part, selection)
        selections.append(selection)
    return selections


def _select_part(call: Call, part: Part, config: StemConfig, selector: Backend) -> BlockSelection:
    budget, grid = budget_of(config, part.prompt_lens), call.grid(part)
    if budget.keeps_everything(grid):
        batch, heads = part.q.shape[:2]
        return BlockSelection.everything(batch=batch, heads=heads, grid=grid, device=part.q.device)
    return selector.select(call, part, config, budget)
