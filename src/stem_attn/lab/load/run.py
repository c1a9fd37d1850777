"""Send requests to two servers at the same time, search for the rate that each stands, and compare what comes when."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from stem_attn.lab.errors import InputError
from stem_attn.lab.load.client import Answer, Request, Server
from stem_attn.lab.prompts import public_text
from stem_attn.lab.results import Record

SERVERS = ("dense", "stem")
WITHIN = 0.99  # of the requests, for a rate to count as served
NEAR = 0.25  # nats: two tokens this close are about as likely, and rounding may swap them
_SEARCHED = (0.5, 1.5)  # of what a server gets through when all come at once: where its goodput is looked for
_LIKELIEST = 20
_SHORT = (1, 2000)  # tokens of a short prompt: by every preset's policy its attention is dense


class Prompts:
    """Stretches of public text, and requests that carry them.

    Args:
        tokenizer: Of the model that is served.
        seed: Of everything random.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._ids: list[int] = tokenizer(public_text()[0]).input_ids
        self._seed, self._starts = seed, random.Random(seed)

    def requests(self, count: int, rate: float, lengths: tuple[int, int], tokens: tuple[int, int]) -> list[Request]:
        """Return requests at the times of a Poisson process.

        Those of another rate are the same but for the pace and the texts, so that rates can be compared.

        Args:
            count: How many.
            rate: A second, on average.
            lengths: Tokens of the shortest and the longest prompt; those between are as likely.
            tokens: Likewise of the answers.
        """
        rng = random.Random(self._seed)
        at, made = 0.0, []
        for _ in range(count):
            at += rng.expovariate(1) / rate
            length = rng.randint(*lengths)
            start = self._starts.randrange(len(self._ids))
            ids = (self._ids[start:] + self._ids * (length // len(self._ids) + 1))[:length]
            made.append(Request(at, ids, rng.randint(*tokens)))
        return made


def compare_servers(
    servers: Mapping[str, Server], prompts: Prompts, settings: Record, on_record: Callable[[Record], None]
) -> None:
    """Load two servers, both at the same time.

    Each is searched for its goodput by itself, with the same requests at its own pace; then both get the same load, the
    dense server's goodput.

    Args:
        servers: One by each name of `SERVERS`.
        prompts: Where requests come from.
        settings: What the command was asked for; see `command.load`.
        on_record: Given a record of what the dense server takes without load, one a trial of the search, one of the
            dense server's goodput on both, and one of short prompts.

    Raises:
        InputError: A server answers nothing before it is loaded.
    """
    lengths, tokens = tuple(settings["lengths"]), tuple(settings["tokens"])
    longest = (lengths[1], lengths[1])
    both(servers, prompts.requests(2, 1.0, longest, tokens))  # what the first requests compile is not timed
    alone = []
    for _ in range(3):
        answers = both(servers, prompts.requests(1, 1.0, longest, tokens))
        alone.append({name: _times(name, given)[0][0] for name, given in answers.items()})
    burst = prompts.requests(settings["burst"], 1e9, lengths, tokens)
    done = {name: max(last for _, last in _times(name, given)) for name, given in both(servers, burst).items()}
    capacity = {name: len(burst) / seconds for name, seconds in done.items()}
    limit = 3 * sorted(one["dense"] for one in alone)[1]
    on_record({"kind": "unloaded", "first_token_seconds": alone, "requests_a_second": capacity, "limit": limit})
    count = max(1, round(capacity["dense"] * settings["seconds"]))
    searches = {name: Search(*(share * capacity[name] for share in _SEARCHED)) for name in servers}

    def load(kind: str, rates: Mapping[str, float]) -> dict[str, Record]:
        asked = {name: prompts.requests(count, rate, lengths, tokens) for name, rate in rates.items()}
        answers = each(servers, asked)
        found = {
            name: {**told(given, limit), "samples": samples(asked[name], given)} for name, given in answers.items()
        }
        on_record({"kind": kind, "requests_a_second": dict(rates), **found})
        return found

    for _ in range(settings["trials"]):
        for name, one in load("search", {name: search.rate for name, search in searches.items()}).items():
            searches[name].tell(one["within_limit"] >= WITHIN)
    if searches["dense"].best is not None:
        load("rate", dict.fromkeys(servers, searches["dense"].best))
    if settings["short"]:
        short = prompts.requests(settings["short"], settings["short"] / settings["short_seconds"], _SHORT, tokens)
        answers = both(servers, short, with_ids=True)
        found = {name: told(given, limit) for name, given in answers.items()}
        again = servers["dense"].replay(short, with_ids=True)
        on_record(
            {
                "kind": "short",
                **found,
                "differ": differing(servers["dense"], short, answers["dense"], answers["stem"]),
                "dense_from_itself": differing(servers["dense"], short, answers["dense"], again),
            }
        )


@dataclass(slots=True)
class Search:
    """The highest rate that a server stands, between two, in requests a second. Every trial halves what lies between.

    Args:
        low: A rate that it may stand.
        high: One that it may not.
        best: The highest that it stood; None: none so far.
    """

    low: float
    high: float
    best: float | None = None

    @property
    def rate(self) -> float:
        """The next one to try."""
        return math.sqrt(self.low * self.high)

    def tell(self, stood: bool) -> None:
        """Take note of whether the server stood it."""
        if stood:
            self.low = self.best = self.rate
        else:
            self.high = self.rate


def both(
    servers: Mapping[str, Server], requests: Sequence[Request], *, with_ids: bool = False
) -> dict[str, list[Answer]]:
    """Send the same requests to both servers at the same times."""
    return each(servers, dict.fromkeys(servers, requests), with_ids=with_ids)


def each(
    servers: Mapping[str, Server], requests: Mapping[str, Sequence[Request]], *, with_ids: bool = False
) -> dict[str, list[Answer]]:
    """Send each server its requests, to both at the same time."""
    with ThreadPoolExecutor(len(servers)) as pool:
        sent = {name: pool.submit(server.replay, requests[name], with_ids=with_ids) for name, server in servers.items()}
        return {name: answers.result() for name, answers in sent.items()}


def told(answers: Sequence[Answer], limit: float) -> Record:
    """Return what a server's answers say: how many are lost, and what the others took."""
    whole = [answer for answer in answers if answer.error is None]
    firsts = torch.tensor([answer.first for answer in whole], dtype=torch.float64)
    later = [(a.last - a.first) / (a.tokens - 1) for a in whole if a.tokens > 1 and a.first and a.last]
    within = sum(answer.first is not None and answer.first <= limit for answer in whole)
    return {
        "requests": len(answers),
        "lost": [answer.error for answer in answers if answer.error is not None],
        "within_limit": within / len(answers),
        "first_token_seconds": {name: _quantile(firsts, q) for name, q in (("p50", 0.5), ("p99", 0.99))},
        "next_token_seconds": _quantile(torch.tensor(later, dtype=torch.float64), 0.5),
        "seconds": max(_lasts(answers), default=None),
    }


def samples(requests: Sequence[Request], answers: Sequence[Answer]) -> list[list[float | None]]:
    """Return of every request when it was due, its prompt's tokens, and when its first and its last token came.

    Times are in seconds, to a tenth of a millisecond, the later two from when it was due.
    """
    return [
        [
            round(request.at, 4),
            len(request.ids),
            *(None if t is None else round(t, 4) for t in (answer.first, answer.last)),
        ]
        for request, answer in zip(requests, answers, strict=True)
    ]


def differing(dense: Server, requests: Sequence[Request], some: Sequence[Answer], others: Sequence[Answer]) -> Record:
    """Compare two lists of answers by their tokens; where they first differ, ask whether both were about as likely.

    Args:
        dense: The server that is asked.
        requests: What the answers are to.
        some: The answers; these are taken for right.
        others: Those that are compared with them.

    Returns:
        Counts: answers that are compared, those that differ, and those of them that differ by more than `NEAR`.
    """
    compared = differ = wrong = 0
    for request, theirs, ours in zip(requests, some, others, strict=True):
        if theirs.error is not None or ours.error is not None:
            continue
        compared += 1
        place = next((n for n, pair in enumerate(zip(theirs.ids, ours.ids, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        differ += 1
        likely = dense.likeliest([*request.ids, *theirs.ids[:place]], _LIKELIEST)
        least = -float("inf")
        wrong += max(likely.values()) - likely.get(ours.ids[place], least) > NEAR
    return {"compared": compared, "differ": differ, "by_more_than_rounding": wrong}


def goodput(records: Sequence[Record], name: str) -> float | None:
    """Return the highest rate of the search at which enough requests were within the limit; None: there is none."""
    trials = [r for r in records if r["kind"] == "search" and r[name]["within_limit"] >= WITHIN]
    return max((trial["requests_a_second"][name] for trial in trials), default=None)


def _times(name: str, answers: Sequence[Answer]) -> list[tuple[float, float]]:
    """Return the times to the first and to the last token, of what was answered.

    Raises:
        InputError: Nothing was, as where the longest prompt is more than the server takes.
    """
    times = [(answer.first, answer.last) for answer in answers if answer.first is not None and answer.last is not None]
    if not times:
        raise InputError(f"--{name}: none of {len(answers)} requests was answered; the first: {answers[0].error}")
    return times


def _lasts(answers: Sequence[Answer]) -> list[float]:
    return [answer.last for answer in answers if answer.last is not None]


def _quantile(values: torch.Tensor, q: float) -> float | None:
    return float(values.quantile(q)) if len(values) else None
