"""The correctness gate: what is not right is not timed.

Query rows are sampled. Attention is compared with float64 over the same kept keys, and may lose at most twice what
torch's dense SDPA of the same dtype loses on those very rows and keys, or what rounding inputs and weights to 8 bits
costs where that is the precision. A selection must be the one that float64 scores give, up to blocks whose scores tie
with the cutoff within rounding.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn.blocks import BlockGrid, BlockSelection
from stem_attn.budget import budget_of
from stem_attn.config import Precision, StemConfig
from stem_attn.reference import capped, reference_row
from stem_attn.scoring import block_scores

_FACTOR = 2.0  # of dense SDPA's error
_ROUNDINGS = 4.0  # of a score, within which two blocks tie
_HEADS, _ROWS = 4, 16  # sampled heads, and query rows of each


class GateError(Exception):
    """A contender's output is wrong."""


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


def draw_samples(batch: int, heads: int, q_len: int, seed: int) -> list[Sample]:
    """Choose heads and query tokens; the first, the last and a tile's edge are always among the tokens."""
    rng = random.Random(seed)
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    edges = {0, q_len - 1, min(127, q_len - 1)}
    count = min(_ROWS, q_len)
    samples = []
    for b, h in rng.sample(pairs, min(_HEADS, len(pairs))):
        tokens = edges | set(rng.sample(range(q_len), count))
        samples.append(Sample(b, h, tuple(sorted(tokens))))
    return samples


class AttentionGate:
    """Know the exact output of sampled rows and the error that they may have."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection | None,
        samples: list[Sample],
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        precision: Precision = "auto",
    ) -> None:
        """Compute the exact rows.

        Args:
            q: [B, Hq, Tq, D].
            k: [B, Hkv, Tk, D].
            v: [B, Hkv, Tk, Dv].
            selection: The kept blocks; None for all of them.
            samples: The rows to look at.
            softcap: Of the logits, or None. SDPA knows none: then what may be lost is what dense attention loses whose
                logits and sums are float32, as with sinks.
            sinks: [Hq], or None.
            precision: Of the products.
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
                sink = None if sinks is None else sinks[s.head]
                weights, total = _weights(row.double(), k_row.double(), softcap, sink)
                exact.append((weights @ v_row.double() / total).flatten())
                if precision == "fp8":
                    row, k_row, v_row = map(_e4m3, (row, k_row, v_row))
                    weights, total = _weights(row, k_row, softcap, sink)
                    dense.append((_e4m3(weights) @ v_row / total).flatten())
                elif softcap is None and sinks is None:
                    dense.append(F.scaled_dot_product_attention(row, k_row, v_row).flatten())
                else:
                    weights, total = _weights(row.float(), k_row.float(), softcap, sink)
                    dense.append((weights.to(v.dtype).float() @ v_row.float() / total).to(v.dtype).flatten())
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


def _e4m3(x: Tensor) -> Tensor:
    """Round to 8 bits, with a scale that makes the largest 448: float32."""
    scale = x.float().abs().amax().clamp(min=1e-15) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def _weights(row: Tensor, keys: Tensor, softcap: float | None, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weigh keys [1, 1, K, D] for a query [1, 1, 1, D]: [1, 1, 1, K], at most 1, and their sum with the sink's."""
    logits = capped(row @ keys.mT * row.shape[3] ** -0.5, softcap)
    peak = logits.amax(-1, keepdim=True)
    peak = peak if sink is None else peak.maximum(sink)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    return weights, total if sink is None else total + (sink - peak).exp()


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    config: StemConfig,
    samples: list[Sample],
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Compare the kept blocks of sampled query blocks, of all heads, with those that float64 scores give.

    Raises:
        GateError: A row keeps a block that it should not, or lacks one.
    """
    grid = BlockGrid(q.shape[2], k.shape[2], config.block_size)
    budget = budget_of(config, (grid.k_len,)).rows(grid).tolist()
    kv_heads = k.shape[1]
    scopes = {"head": q.shape[1], "group": kv_heads, "layer": 1}[config.budget_scope]
    sampled = sorted({(s.batch, (token + grid.offset) // grid.block_size) for s in samples for token in s.tokens})
    batches, logits = {b for b, _ in sampled}, (softcap, sinks)
    exact = {b: _ExactScores(q[b], k[b], v[b], config, grid, *logits) for b in batches}
    for batch, block in sampled:
        row = block - grid.first_block
        scores, rounding = exact[batch].row(row)
        wanted = reference_row(scores.tolist(), budget[row], block, config, kv_heads)
        kept = [
            selection.indices[batch, head, row, : int(selection.counts[batch, head, row])].tolist()
            for head in range(q.shape[1])
        ]
        if config.budget_scope != "head" and config.score == "linear":
            scores = scores - scores[:, : block + 1].logsumexp(-1, keepdim=True)
        for heads in torch.arange(q.shape[1]).view(scopes, -1).tolist():
            swapped = [float(scores[h, j]) for h in heads for j in {*kept[h]} ^ {*wanted[h]}]
            sizes = [sum(len(rows[h]) for h in heads) for rows in (kept, wanted)]
            if config.budget_scope == "head":
                swapped.append(_cutoff(scores[heads[0]].tolist(), budget[row], block, config))
            wrong = len(swapped) > 1 and not max(swapped) - min(swapped) <= _ROUNDINGS * rounding
            uneven = config.forced_blocks == "inside" and sizes[0] != sizes[1]
            if wrong or uneven or any(kept[h] != sorted({*kept[h]}) for h in heads):
                raise GateError(
                    f"heads {heads[0]} to {heads[-1]}, query block {block}: keep {sizes[0]} blocks where float64 "
                    f"scores keep {sizes[1]}, and differ by more than rounding"
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


class _ExactScores:
    """Score query blocks of one batch row in float64; what they share of the keys is worked out once.

    Args:
        q: [Hq, Tq, D].
        k: [Hkv, Tk, D].
        v: [Hkv, Tk, Dv].
        config: The method.
        grid: The geometry.
        softcap: Of the logits, or None.
        sinks: [Hq], or None.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: StemConfig,
        grid: BlockGrid,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        self._q, self._config, self._grid, self._softcap = q, config, grid, softcap
        self._sinks = q.new_full((len(q),), -torch.inf) if sinks is None else sinks
        self._counts = _token_counts(grid.k_len, config.stride, k.device)  # of the runs of keys
        self._keys = _linear_keys(k, config) if config.score == "linear" else _mass_keys(k, self._counts, config)
        # A query of zeros has no logits: what is left is the value term of every key block.
        linear = dataclasses.replace(config, score="linear")
        bonus = block_scores(torch.zeros_like(q[None, :, -1:]), k[None], v[None], linear, 1.0)
        self._bonus = bonus[0, :, -1].double()

    def row(self, row: int) -> tuple[Tensor, float]:
        """Score a query block against all key blocks.

        Returns:
            Scores float64 [Hq, Kb], and the rounding that a score may have: that of float32 arithmetic, or on a GPU of
            products in bfloat16.
        """
        grid, size = self._grid, self._config.block_size
        start, stop = grid.q_span(row)
        lead = start + grid.offset - (grid.first_block + row) * size
        padding = lead, size - lead - (stop - start)
        tokens = F.pad(self._q[:, start:stop].double(), (0, 0, *padding))
        present = F.pad(torch.ones(stop - start, device=tokens.device).double(), padding)
        coarse = torch.bfloat16 if tokens.is_cuda else torch.float32
        products, rounded = (self._estimate(tokens, present, row, dtype) for dtype in (torch.float64, coarse))
        scores = products + self._bonus
        finite = products.isfinite()
        float32 = torch.finfo(torch.float32).eps * float(scores[finite].abs().max())
        return scores, max(float((rounded - products)[finite].abs().max()), float32)

    def _estimate(self, tokens: Tensor, present: Tensor, row: int, dtype: torch.dtype) -> Tensor:
        """Estimate [Hq, Kb] of a padded query block, tokens [Hq, size, D], after rounding the factors to a dtype."""
        config, block = self._config, self._grid.first_block + row
        if config.score == "linear":
            products = _products(_group_means(tokens, 1, config).flatten(2), self._keys, dtype)
            return capped(products[:, 0] * (tokens.shape[2] ** -0.5 / config.stride), self._softcap)
        runs = config.block_size // config.stride
        queries, exist = _mass_queries(tokens, present, config)
        logits = _products(queries, self._keys[:, : (block + 1) * runs], dtype)
        logits = capped(logits, self._softcap) + self._counts[: (block + 1) * runs].log()
        logits = F.pad(logits, (0, (block + 1) * runs - logits.shape[-1]), value=-torch.inf)
        masses = torch.unflatten(logits, -1, (block + 1, -1)).logsumexp(-1)
        whole = masses.logsumexp(-1, keepdim=True).logaddexp(self._sinks.double()[:, None, None])
        taken = (masses - whole)[:, exist]
        return F.pad(taken.amax(1), (0, self._grid.k_blocks - block - 1), value=-torch.inf)


def _products(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply queries [Hq, M, N] with the keys [Hkv, K, N] of their KV head, both rounded: float64 [Hq, M, K]."""
    rows = queries.to(dtype).double().view(keys.shape[0], -1, queries.shape[2])
    products: Tensor = rows @ keys.to(dtype).double().mT
    return products.view(*queries.shape[:2], keys.shape[1])


def _linear_keys(k: Tensor, config: StemConfig) -> Tensor:
    """Pool keys [Hkv, Tk, D] for linear scores: float64 [Hkv, Kb, stride * D]."""
    return _group_means(k.double(), -(-k.shape[1] // config.block_size), config).flip(2).flatten(2)


def _mass_keys(k: Tensor, counts: Tensor, config: StemConfig) -> Tensor:
    """Pool keys [Hkv, Tk, D] for masses, runs of `counts` tokens each: float64 [Hkv, runs, D + D/2]."""
    runs = torch.unflatten(F.pad(k.double(), (0, 0, 0, -k.shape[1] % config.stride)), 1, (-1, config.stride))
    means = runs.sum(2) / counts[:, None]
    spread = runs.square().sum(2) / counts[:, None] - means.square()
    return torch.cat([means, _pairs(spread)], -1)


def _mass_queries(tokens: Tensor, present: Tensor, config: StemConfig) -> tuple[Tensor, Tensor]:
    """Pool a padded query block [Hq, size, D] to [Hq, runs, D + D/2]; and tell which runs exist."""
    scale, stride = tokens.shape[2] ** -0.5, config.query_stride
    counts = present.view(-1, stride).sum(-1)
    means = torch.unflatten(tokens, 1, (-1, stride)).sum(2) / counts.clamp(min=1)[:, None]
    return torch.cat([means * scale, _pairs(means.square()) * scale**2 * config.spread_weight / 4], -1), counts > 0


def _token_counts(length: int, stride: int, device: torch.device) -> Tensor:
    """Count the tokens of every `stride` in a row: float64 [ceil(length / stride)]."""
    ones = torch.ones(length, dtype=torch.float64, device=device)
    return F.pad(ones, (0, -length % stride)).view(-1, stride).sum(-1)


def _pairs(x: Tensor) -> Tensor:
    """Add up dimensions j and j + D/2: [..., D] to [..., ceil(D / 2)]."""
    half = -(-x.shape[-1] // 2)
    return x[..., :half] + F.pad(x[..., half:], (0, 2 * half - x.shape[-1]))


def _group_means(tokens: Tensor, blocks: int, config: StemConfig) -> Tensor:
    """Means of each block's tokens by position modulo the stride, [H, blocks, stride, D]; missing ones are 0."""
    size, stride = config.block_size, config.stride
    padded = F.pad(tokens, (0, 0, 0, blocks * size - tokens.shape[1]))
    return padded.view(tokens.shape[0], blocks, size // stride, stride, -1).mean(2)
