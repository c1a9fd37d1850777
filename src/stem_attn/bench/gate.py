"""The correctness gate: what is not right is not timed.

Query rows are sampled. Attention is compared with float64 over the same kept keys, and may lose at most twice what
torch's dense SDPA of the same dtype loses on those very rows and keys. A selection must be the one that float64
scores give, up to blocks whose scores tie with the cutoff within rounding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.bench.shapes import Case
from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import block_budget
from stem_attn.config import StemConfig
from stem_attn.reference import reference_row
from stem_attn.scoring import block_scores

_FACTOR = 2.0  # of dense SDPA's error
_ROUNDINGS = 4.0  # of a score, within which two blocks tie
_HEADS, _ROWS = 4, 16  # sampled heads, and query rows of each


class GateError(Exception):
    """A method's output is wrong."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of sampled rows, each in units of the root mean square of its exact row."""

    max: float
    rms: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A head and some of its query tokens."""

    batch: int
    head: int
    tokens: tuple[int, ...]


def draw_samples(case: Case, seed: int) -> list[Sample]:
    """Choose heads and query tokens; the first, the last and a tile's edge are always among the tokens."""
    rng = random.Random(seed)
    pairs = [(b, h) for b in range(case.batch) for h in range(case.shape.heads)]
    edges = {0, case.q_len - 1, min(127, case.q_len - 1)}
    count = min(_ROWS, case.q_len)
    samples = []
    for batch, head in rng.sample(pairs, min(_HEADS, len(pairs))):
        tokens = edges | set(rng.sample(range(case.q_len), count))
        samples.append(Sample(batch, head, tuple(sorted(tokens))))
    return samples


class AttentionGate:
    """Know the exact output of sampled rows and the error that they may have."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection | None, samples: list[Sample]
    ) -> None:
        """Compute the exact rows.

        Args:
            q: [B, Hq, Tq, D].
            k: [B, Hkv, Tk, D].
            v: [B, Hkv, Tk, Dv].
            selection: The kept blocks; None for all of them.
            samples: The rows to look at.
        """
        self.selection = selection
        self._samples = samples
        exact, dense = [], []
        for s in samples:
            kv_head = s.head * k.shape[1] // q.shape[1]
            for token in s.tokens:
                keys = _kept_keys(selection, s, token, q.shape[2], k.shape[2], q.device)
                row, k_row, v_row = (x[None, None] for x in (
                    q[s.batch, s.head, token : token + 1], k[s.batch, kv_head, keys], v[s.batch, kv_head, keys]
                ))  # fmt: skip
                weights = (row.double() @ k_row.double().mT * q.shape[3] ** -0.5).softmax(-1)
                exact.append((weights @ v_row.double()).flatten())
                dense.append(F.scaled_dot_product_attention(row, k_row, v_row).flatten())
        self._exact = torch.stack(exact)
        self._unit = self._exact.square().mean(-1, keepdim=True).sqrt()
        lost = self._errors(torch.stack(dense))
        self.budget = Errors(_FACTOR * lost.max, _FACTOR * lost.rms)

    def check(self, out: Tensor) -> Errors:
        """Measure an output [B, Hq, Tq, Dv].

        Raises:
            GateError: Its error is above the budget.
        """
        rows = torch.stack([out[s.batch, s.head, token] for s in self._samples for token in s.tokens])
        found = self._errors(rows)
        # Written so that NaN fails.
        if not (found.max <= self.budget.max and found.rms <= self.budget.rms):
            raise GateError(
                f"error max {found.max:.2e}, rms {found.rms:.2e} against float64; "
                f"allowed {self.budget.max:.2e}, {self.budget.rms:.2e}"
            )
        return found

    def _errors(self, rows: Tensor) -> Errors:
        relative = (rows.double() - self._exact) / self._unit
        return Errors(float(relative.abs().max()), float(relative.square().mean().sqrt()))


def _kept_keys(
    selection: BlockSelection | None, sample: Sample, token: int, q_len: int, k_len: int, device: torch.device
) -> Tensor:
    """Positions of the keys that one query token of a head attends to."""
    position = token + k_len - q_len
    if selection is None:
        return torch.arange(position + 1, device=device)
    size = selection.block_size
    row = position // size - selection.grid.first_block
    count = int(selection.counts[sample.batch, sample.head, row])
    blocks = selection.indices[sample.batch, sample.head, row, :count].long()
    keys = (blocks[:, None] * size + torch.arange(size, device=device)).flatten()
    return keys[keys <= position]


def check_selection(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, config: StemConfig, samples: list[Sample]
) -> None:
    """Compare the kept blocks of sampled rows with those that float64 scores give.

    Raises:
        GateError: A row keeps a block that it should not, or lacks one.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    budget = block_budget(config, grid.k_len, grid).tolist()
    for s in samples:
        rows = sorted({(token + grid.offset) // grid.block_size - grid.first_block for token in s.tokens})
        scores, rounding = _exact_scores(q, k, v, config, s, rows)
        for row, score in zip(rows, scores.tolist(), strict=True):
            block = grid.first_block + row
            count = int(selection.counts[s.batch, s.head, row])
            kept = selection.indices[s.batch, s.head, row, :count].tolist()
            wanted = reference_row(score, budget[row], block, config)
            cutoff = _cutoff(score, budget[row], block, config)
            wrong = [j for j in {*kept} ^ {*wanted} if not abs(score[j] - cutoff) <= _ROUNDINGS * rounding]
            uneven = config.forced_blocks == "inside" and len(kept) != len(wanted)
            if wrong or uneven or kept != sorted({*kept}):
                raise GateError(
                    f"head {s.head}, query block {block}: keeps {len(kept)} blocks where float64 scores keep "
                    f"{len(wanted)}; {len(wrong)} differ by more than rounding"
                )


def _cutoff(score: list[float], budget: int, block: int, config: StemConfig) -> float:
    """Score of the last block that top-k takes in a row."""
    causal = range(block + 1)
    forced = {j for j in causal if j < config.sink_blocks or j > block - config.local_blocks}
    if config.forced_blocks == "on_top":
        pool, take = sorted((score[j] for j in causal), reverse=True), budget
    else:
        pool, take = sorted((score[j] for j in causal if j not in forced), reverse=True), budget - len(forced)
    return pool[min(take, len(pool)) - 1] if pool and take > 0 else float("inf")


def _exact_scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, sample: Sample, rows: list[int]
) -> tuple[Tensor, float]:
    """Score some query blocks of a head against all key blocks in float64.

    Returns:
        Scores float64 [rows, Kb], and the rounding that a score may have: that of float32 arithmetic, or on a GPU of
        products in bfloat16.
    """
    size, stride = config.block_size, config.stride
    grid = BlockGrid(q.shape[2], k.shape[2], size)
    kv_head = sample.head * k.shape[1] // q.shape[1]
    k_head, v_head = (x[sample.batch, kv_head] for x in (k, v))
    k_means = _group_means(k_head, grid.k_blocks, config).flip(1).flatten(1)
    q_rows = []
    for row in rows:
        start, stop = grid.q_span(row)
        lead = start + grid.offset - (grid.first_block + row) * size
        tokens = F.pad(q[sample.batch, sample.head, start:stop], (0, 0, lead, 0))
        q_rows.append(_group_means(tokens, 1, config).flatten())
    q_means = torch.stack(q_rows)
    factor = q.shape[3] ** -0.5 / stride
    products = q_means @ k_means.T * factor
    coarse = torch.bfloat16 if q.is_cuda else torch.float32
    rounded = q_means.to(coarse).double() @ k_means.to(coarse).double().T * factor
    # A query of zeros has no logits: what is left is the value term of every key block.
    bonus = block_scores(torch.zeros_like(q[:1, :1, -1:]), k_head[None, None], v_head[None, None], config, 1.0)
    scores = products + bonus[0, 0, -1].double()
    float32 = torch.finfo(torch.float32).eps * float(scores.abs().max())
    return scores, max(float((rounded - products).abs().max()), float32)


def _group_means(tokens: Tensor, blocks: int, config: StemConfig) -> Tensor:
    """Means of each block's tokens by position modulo the stride, float64 [blocks, stride, D]; missing ones are 0."""
    size, stride = config.block_size, config.stride
    padded = F.pad(tokens.double(), (0, 0, 0, blocks * size - tokens.shape[0]))
    return padded.view(blocks, size // stride, stride, -1).mean(1)
