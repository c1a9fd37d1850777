"""What one step does with its batch: which tokens attend sparsely, and which are left to the dense parent.

A step holds some tokens of every request in the batch: a chunk of a prompt, or the tokens of a decode. Rows are the
tokens' absolute positions, so a plan is made of host integers only and every layer of a step shares it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from stem_attn.backends.base import Backend, Geometry
from stem_attn.blocks import BlockGrid
from stem_attn.integrations.vllm.settings import Settings

DECODE = "decode"
"""Why the tokens of answers are dense."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request's part of a step.

    Args:
        q_start: First token within the batch.
        q_len: Tokens in this step.
        k_len: Tokens of the request so far, this step's included.
        prefilling: Whether vLLM calls this step prefill; its V2 runner calls an answer so that is computed again.
        prompt_len: Tokens of the whole prompt, or None where the request does not tell.
        settings: What its prompt is computed with; or why it is computed with dense attention.
    """

    q_start: int
    q_len: int
    k_len: int
    prefilling: bool
    prompt_len: int | None
    settings: Settings | str


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one request that attend sparsely.

    Args:
        row: The request's row in the batch: in `block_table`, `seq_lens`.
        q_start: First token within the batch.
        q_len: Tokens.
        k_len: Keys that the last of them sees; the first is at position `k_len - q_len`.
        prompt_len: Tokens of the whole prompt, which sets the budget; at least `k_len`.
        settings: What they are computed with.
    """

    row: int
    q_start: int
    q_len: int
    k_len: int
    prompt_len: int
    settings: Settings

    @property
    def tokens(self) -> slice:
        """The tokens' place within the batch."""
        return slice(self.q_start, self.q_start + self.q_len)

    @property
    def causal_blocks(self) -> int:
        """Key blocks that a dense head would read."""
        return BlockGrid(self.q_len, self.k_len, self.settings.config.block_size).causal_blocks


@dataclass(frozen=True, slots=True)
class Run:
    """Spans that follow one another, in the batch's tokens and in its rows, with the same settings: one call.

    Args:
        spans: At least one.
        rows: Their requests' rows in the batch.
        tokens: Their place within the batch.
        cu_seqlens_q: Where each span's tokens begin and end, from 0.
        seq_lens: Their keys.
        prompt_lens: Tokens of their whole prompts.
    """

    spans: tuple[Span, ...]
    rows: slice
    tokens: slice
    cu_seqlens_q: list[int]
    seq_lens: list[int]
    prompt_lens: list[int]

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Run:
        """Join spans that follow one another."""
        start, last = spans[0].q_start, spans[-1]
        return cls(
            tuple(spans),
            slice(spans[0].row, last.row + 1),
            slice(start, last.tokens.stop),
            [0, *(span.tokens.stop - start for span in spans)],
            [span.k_len for span in spans],
            [span.prompt_len for span in spans],
        )

    @property
    def settings(self) -> Settings:
        """What the tokens are computed with."""
        return self.spans[0].settings


def runs_of(spans: Iterable[Span]) -> tuple[Run, ...]:
    """Group spans that one call can do."""
    runs: list[list[Span]] = []
    for span in spans:
        if runs and _follows(span, runs[-1][-1]):
            runs[-1].append(span)
        else:
            runs.append([span])
    return tuple(map(Run.of, runs))


def _follows(span: Span, last: Span) -> bool:
    places = (span.row, span.q_start) == (last.row + 1, last.tokens.stop)
    return places and span.settings == last.settings


@dataclass(frozen=True, slots=True)
class Rest:
    """Consecutive tokens of one request that are left to the dense parent; the last of them is the request's last.

    Args:
        row: The request's row in the batch.
        q_start: First token within the batch.
        q_len: Tokens.
    """

    row: int
    q_start: int
    q_len: int


@dataclass(frozen=True, slots=True)
class Split:
    """A batch taken apart.

    Args:
        spans: The sparse tokens.
        rests: All others, in the order of the batch.
        reasons: Tokens of the rests by reason.
        unknown_prompt_len_tokens: Tokens of the spans whose whole prompt length nobody told.
    """

    spans: tuple[Span, ...]
    rests: tuple[Rest, ...]
    reasons: dict[str, int]
    unknown_prompt_len_tokens: int


def split_batch(
    requests: Sequence[Request],
    dense: Collection[Settings],
    backend: Backend | None,
    geometry: Geometry,
    decode_len: int,
) -> Split:
    """Take a batch apart into sparse spans and dense rests.

    With the prompt's length told, its tokens are sparse and all later ones dense, whatever step computes them: a
    preempted request that computes its own answer again does it as it did the first time. Without it, a chunk is
    budgeted by the tokens seen so far.

    Args:
        requests: One a row of the batch; rows without tokens (padding) are skipped.
        dense: Settings by which the layers in question are dense.
        backend: What attends sparsely; None: nothing that says what it gains.
        geometry: What is known of the calls before they come.
        decode_len: Up to so many tokens of a request vLLM computes as a decode, perhaps by replaying a CUDA graph of
            one, which holds the dense parent: a prompt's last token behind a chunk or a cached prefix.
    """
    spans: list[Span] = []
    rests: list[Rest] = []
    reasons: Counter[str] = Counter()
    unknown = 0
    for row, request in enumerate(requests):
        if not request.q_len:
            continue
        prompt_tokens = _prompt_tokens(request)
        sparse_tokens = 0
        if prompt_tokens:
            found = _sparse(row, request, prompt_tokens, dense, backend, geometry, decode_len)
            if isinstance(found, Span):
                sparse_tokens = prompt_tokens
                spans.append(found)
                unknown += prompt_tokens if request.prompt_len is None else 0
            else:
                reasons[found] += prompt_tokens
        if prompt_tokens < request.q_len:
            reasons[DECODE] += request.q_len - prompt_tokens
        if sparse_tokens < request.q_len:
            rests.append(Rest(row, request.q_start + sparse_tokens, request.q_len - sparse_tokens))
    return Split(tuple(spans), tuple(rests), dict(reasons), unknown)


def _prompt_tokens(request: Request) -> int:
    """Count the tokens of a request's part that belong to its prompt; they come first."""
    if request.prompt_len is None:
        return request.q_len if request.prefilling else 0
    before = request.k_len - request.q_len
    return min(max(request.prompt_len - before, 0), request.q_len)


def _sparse(
    row: int,
    request: Request,
    tokens: int,
    dense: Collection[Settings],
    backend: Backend | None,
    geometry: Geometry,
    decode_len: int,
) -> Span | str:
    """Return the span of a request's prompt tokens, or why they are dense."""
    settings = request.settings
    if isinstance(settings, str):
        return settings
    if settings in dense:
        return "dense layer"
    k_len = request.k_len - request.q_len + tokens
    prompt_len = k_len if request.prompt_len is None else request.prompt_len
    # All layers alike: told without the factors that single layers have on their budgets.
    call = (prompt_len, BlockGrid(tokens, k_len, settings.config.block_size))
    told = None if request.prompt_len is None else (prompt_len,)
    reason = settings.policy.why_dense(settings.config, (call,), told, backend, geometry)
    if reason is None and request.q_len <= decode_len:
        reason = DECODE
    return reason or Span(row, request.q_start, tokens, k_len, prompt_len, settings)
