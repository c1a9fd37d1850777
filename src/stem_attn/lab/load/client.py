"""A client of an OpenAI-compatible server: streams answers, many at once, at times that were set before."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stem_attn.lab.errors import InputError

_SECONDS = 600  # without a word from the server


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, and when.

    Args:
        at: Seconds from the start.
        ids: The prompt's tokens.
        tokens: Tokens of the answer.
    """

    at: float
    ids: list[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came.

    Args:
        first: Seconds from when the request was due to its first token; None: nothing came.
        last: Likewise to its last.
        tokens: Tokens that the server counted.
        ids: They themselves, where they were asked for.
        error: Why the answer is not whole; None: it is.
    """

    first: float | None
    last: float | None
    tokens: int
    ids: tuple[int, ...]
    error: str | None


class Server:
    """An OpenAI-compatible server.

    Args:
        url: As `http://127.0.0.1:8000`.

    Raises:
        InputError: The address is another kind of one, or the server does not answer.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.netloc or parts.path.strip("/"):
            raise InputError(f"a server's address is http://HOST:PORT, got {url!r}")
        self._address = parts.netloc
        try:
            self._model = self._json("GET", "/v1/models")["data"][0]["id"]
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            raise InputError(f"no server with /v1/models at {url}: {error}") from error

    def replay(self, requests: Sequence[Request], *, with_ids: bool) -> list[Answer]:
        """Send every request when it is due, whatever has been answered by then; return the answers in their order.

        Args:
            requests: What is sent.
            with_ids: Ask for the answers' tokens; an answer without all of them is not whole.
        """
        bodies = [self._body(request, with_ids) for request in requests]
        began = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as clients:
            answers = []
            for request, body in zip(requests, bodies, strict=True):
                due = began + request.at
                time.sleep(max(0.0, due - time.perf_counter()))
                answers.append(clients.submit(self._stream, body, due, request.tokens, with_ids))
            return [answer.result() for answer in answers]

    def likeliest(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """Return the log-probabilities of the likeliest next tokens."""
        asked = {"model": self._model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": count}
        answer = self._json("POST", "/v1/completions", json.dumps({**asked, "return_tokens_as_token_ids": True}))
        (found,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        return {int(name.removeprefix("token_id:")): value for name, value in found.items()}

    def _body(self, request: Request, with_ids: bool) -> str:
        return json.dumps(
            {
                "model": self._model,
                "prompt": request.ids,
                "max_tokens": request.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": with_ids,
            }
        )

    def _stream(self, body: str, due: float, tokens: int, with_ids: bool) -> Answer:
        first = last = None
        counted, finish = 0, None
        ids: list[int] = []
        connection = http.client.HTTPConnection(self._address, timeout=_SECONDS)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                return Answer(None, None, 0, (), f"HTTP {response.status}: {response.read().decode()[:200]}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                for choice in event.get("choices", ()):
                    last = time.perf_counter() - due
                    first = last if first is None else first
                    ids += choice.get("token_ids") or ()
                    finish = choice["finish_reason"] or finish
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Answer(first, last, counted, tuple(ids), repr(error))
        finally:
            connection.close()
        if with_ids and len(ids) != counted:
            return Answer(first, last, counted, tuple(ids), f"{counted} tokens, and the ids of {len(ids)}")
        whole = finish == "length" and counted == tokens
        return Answer(first, last, counted, tuple(ids), None if whole else f"{counted} of {tokens} tokens, {finish}")

    def _json(self, method: str, path: str, body: str | None = None) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise InputError(f"{path}: HTTP {response.status}: {text[:200]}")
            return json.loads(text)
        finally:
            connection.close()
