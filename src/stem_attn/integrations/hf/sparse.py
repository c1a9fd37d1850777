"""One sparse call of a layer: its parts, one after the other, what they kept and how true they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stem_attn import backends
from stem_attn.api import block_sparse_attention, stem_attention
from stem_attn.audit import AuditSums
from stem_attn.backends.base import Backend
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
        self.kept: list[Kept] = []
        self._backend: Backend | None = None  # of the audited parts: they differ in lengths only
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
        self.kept.append(Kept.of(selection))
        if state.policy.audit_rows:
            call = self._exactly(q, k, v)
            if self._backend is None:
                self._backend = backends.for_call(state.backend, call, again=True)
            seed = state.counters.next_audit_seed()
            sums = audit(call, [selection], out, self._backend, rows=state.policy.audit_rows, seed=seed)
            self._audit = sums if self._audit is None else self._audit + sums
        return out

    def misses(self, layer: int | None) -> bool | Tensor:
        """Count the audit, and tell whether the call misses the policy's target.

        Args:
            layer: The layer's index.

        Returns:
            bool [] on the device if the backend can tell there, so that nobody waits; otherwise a bool.
        """
        policy, sums, backend = self._state.policy, self._audit, self._backend
        if sums is None or backend is None:
            return False
        self._state.counters.audit(layer, sums)
        return policy.missed_by(sums, backend)

    def attend_if(self, wanted: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attend to all blocks if a flag says so: bool [] on the device; out [B, Hq, Tq, Dv] is then overwritten."""
        assert self._backend is not None  # it has told what is wanted
        self._backend.attend_if(self._exactly(q, k, v), wanted, out)

    def _exactly(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """Return the call that the sparse one stands for."""
        asked = {**self._how, "scale": resolve_scale(self._how["scale"], q.shape[3])}
        return Call(Layout.dense(q, k, v), self._state.block_size, **asked)
