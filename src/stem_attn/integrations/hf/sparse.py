"""One sparse call of a layer: its parts, one after the other, what they kept and how true they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stem_attn.api import block_sparse_attention, stem_attention
from stem_attn.audit import AuditSums
from stem_attn.call import Call
from stem_attn.checks import resolve_scale
from stem_attn.config import StemConfig
from stem_attn.integrations.hf.counters import Kept
from stem_attn.integrations.hf.state import State
from stem_attn.layout import Layout
from stem_attn.run import audit


class SparseCall:
    """Attend to the parts of a call, and keep what is counted once it stands.

    Args:
        state: The model's settings and counters.
        config: The layer's; of another method only `residual` and `precision`.
        how: What attention is asked for: `scale`, `softcap` and `sinks` of the public functions.
    """

    def __init__(self, state: State, config: StemConfig, how: dict[str, Any]) -> None:
        self._state = state
        self._config = config
        self._how = how
        self._kept: list[Kept] = []
        self._audit: AuditSums | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lens: list[int]) -> Tensor:
        """Attend to batch rows that are padded alike, without their padding.

        Args:
            q: [B, Hq, Tq, D].
            k: [B, Hkv, Tk, D].
            v: [B, Hkv, Tk, Dv].
            lens: Tokens of every row's whole prompt.

        Returns:
            [B, Hq, Tq, Dv].
        """
        state, config, how = self._state, self._config, self._how
        if state.method is None:
            out, selection = stem_attention(
                q, k, v, config=config, prompt_len=lens, backend=state.backend, return_selection=True, **how
            )
        else:
            selection = state.method.select(q, k, v, scale=how["scale"], prompt_len=lens)
            asked: Any = {"residual": config.residual, "precision": config.precision, "backend": state.backend}
            out = block_sparse_attention(q, k, v, selection, **asked, **how)
        self._kept.append(Kept.of(selection))
        if state.policy.audit_rows:
            asked = {**how, "scale": resolve_scale(how["scale"], q.shape[3])}
            call = Call(Layout.dense(q, k, v, lens), state.block_size, **asked)
            seed = state.counters.next_audit_seed()
            sums = audit(call, [selection], out, state.backend, rows=state.policy.audit_rows, seed=seed)
            self._audit = sums if self._audit is None else self._audit + sums
        return out

    def stands(self, layer: int | None) -> bool:
        """Count the call, and tell whether it meets the policy's target. Where there is one, this waits for the device.

        Args:
            layer: The layer's index.
        """
        counters, policy = self._state.counters, self._state.policy
        if self._audit is not None:
            missed = policy.has_target and policy.misses(self._audit.read())
            counters.audit(layer, self._audit, redone=missed)
            if missed:
                return False
        for kept in self._kept:
            counters.kept(kept)
        return True
