"""Compare the next-token distributions of two runs, position by position, without holding all logits at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOGITS_BYTES = 64 * 2**20  # of one side's float32 logits at a time
_LOGITS_BYTES_CUDA = 512 * 2**20


@dataclass(frozen=True, slots=True)
class PositionNumbers:
    """What two runs predict at some positions of a prompt.

    Args:
        positions: int64 [P], ascending.
        kl_nats: float64 [P]; KL(dense || sparse) of the next-token distributions.
        agrees: bool [P]; whether both predict the same token.
        dense_nll: float64 [P], or P - 1 where the prompt's last position is among them; negative log-likelihood of
            the prompt's next token, in nats.
        sparse_nll: The same of the sparse run.
    """

    positions: Tensor
    kl_nats: Tensor
    agrees: Tensor
    dense_nll: Tensor
    sparse_nll: Tensor

    @property
    def mean_kl_nats(self) -> float:
        """Mean over the positions."""
        return float(self.kl_nats.mean())

    @property
    def top1_agreement(self) -> float:
        """Share of the positions."""
        return float(self.agrees.double().mean())

    @property
    def dense_perplexity(self) -> float:
        """Of the prompt's next tokens."""
        return math.exp(float(self.dense_nll.mean()))

    @property
    def sparse_perplexity(self) -> float:
        """Of the prompt's next tokens."""
        return math.exp(float(self.sparse_nll.mean()))


@contextmanager
def keep_hidden(model: Any) -> Iterator[list[Any]]:
    """Collect the base model's outputs, last hidden states only, of the forwards inside the block."""
    outputs: list[Any] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append(type(output)(last_hidden_state=output.last_hidden_state))

    hook = model.base_model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


def compare_positions(model: Any, dense: Any, sparse: Any, ids: Tensor, *, stride: int = 1) -> PositionNumbers:
    """Compare what a model predicts from two sets of hidden states.

    Args:
        model: A transformers causal language model.
        dense: What `keep_hidden` collected of the dense run.
        sparse: The same of the sparse run.
        ids: int64 [1, T], the prompt.
        stride: Look at positions 0, stride, 2 * stride, ... only.
    """
    tokens = ids.shape[1]
    room = _LOGITS_BYTES_CUDA if ids.is_cuda else _LOGITS_BYTES
    rows = max(1, room // (4 * model.get_output_embeddings().weight.shape[0]))
    found: list[list[Tensor]] = [[], [], [], []]
    for first in range(0, tokens, rows * stride):
        positions = torch.arange(first, min(first + rows * stride, tokens), stride, device=ids.device)
        targets = ids[0, positions[positions < tokens - 1] + 1, None]
        p, q = (_logits(model, hidden, positions).float().log_softmax(-1) for hidden in (dense, sparse))
        agrees = p.argmax(-1) == q.argmax(-1)
        nll = (-side[: len(targets)].gather(1, targets)[:, 0].double() for side in (p, q))
        kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
        for part, numbers in zip(found, (kl, agrees, *nll), strict=True):
            part.append(numbers.cpu())
    return PositionNumbers(torch.arange(0, tokens, stride), *(torch.cat(part) for part in found))


def _logits(model: Any, hidden: Any, positions: Tensor) -> Tensor:
    """Return the logits [positions, vocab] that the model makes of given hidden states.

    The base model is made to return them, so that whatever the model does around its output layer (scaling, soft
    capping) is done as ever.
    """
    base = model.base_model
    own = base.__dict__.get("forward")
    base.forward = lambda *args, **kwargs: hidden
    try:
        logits = model(positions[None], use_cache=False, logits_to_keep=positions).logits
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own
    return logits[0]  # type: ignore[no-any-return]
