"""Attention that is checked: sampled rows attend exactly, and where a target is missed all of them do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stem_attn import backends, run
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.integrations.vllm.counters import counters
from stem_attn.policy import PrefillPolicy


def audit(
    call: Call, selection: BlockSelection, out: Tensor, policy: PrefillPolicy, backend: str, layer: int | None
) -> None:
    """Audit a sparse call of one sequence, count what is found, and attend again where it misses the policy's target.

    Sequences are audited, and decided, one by one, so that a request's answer does not depend on its batch.

    Args:
        call: What was attended sparsely.
        selection: The blocks that it kept.
        out: [1, Hq, T, Dv], what came out; overwritten by attention over all blocks where the target is missed.
        policy: Says how many rows, and the target.
        backend: That attended, or `"auto"`.
        layer: The layer's index; None: it has none.
    """
    exact = replace(call, residual="none", precision="auto")
    chosen = backends.for_call(backend, exact, again=True)
    seed = counters.audits.next_seed()
    sums = run.audit(exact, [selection], out, chosen, rows=policy.audit_rows, seed=seed)
    missed = policy.missed_by(sums, chosen)
    if not isinstance(missed, Tensor):
        missed = torch.full((), missed, dtype=torch.bool, device=out.device)
    if policy.has_target:
        chosen.attend_if(exact, missed, out)
    counters.audits.add(layer, sums, call.q.shape[2], missed)
