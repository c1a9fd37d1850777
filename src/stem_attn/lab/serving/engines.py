"""vLLM engines, each in a process of its own: start one, ask it, stop it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from stem_attn.lab.results import Record

WORKER = "stem_attn.integrations.vllm.worker.StemWorkerExtension"
_engines: list[Any] = []  # in an engine's process: the engine


class Engine:
    """An engine that runs.

    Args:
        pool: Its process.
        counted: Whether Stem counts what it does there.
    """

    def __init__(self, pool: ProcessPoolExecutor, counted: bool) -> None:
        self._pool, self._counted = pool, counted

    def answer(self, ids: list[int], tokens: int) -> Record:
        """Answer a prompt greedily; tell how long it took, and what Stem did if it counts."""
        return self._pool.submit(_answer, ids, tokens, self._counted).result()


@contextmanager
def running_engine(options: Record, *, counted: bool) -> Iterator[Engine]:
    """Start an engine with vLLM's options, and stop it at the end of a `with` block.

    Args:
        options: Of `vllm.LLM`.
        counted: Whether Stem's worker extension is among them.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_start, options).result()
        try:
            yield Engine(pool, counted)
        finally:
            pool.submit(_stop).result()


def _start(options: Record) -> None:
    from vllm import LLM

    _engines.append(LLM(**options))


def _stop() -> None:
    """Stop this process's engine, whose own processes would keep this one from ending."""
    _engines.pop().llm_engine.engine_core.shutdown()


def _answer(ids: list[int], tokens: int, counted: bool) -> Record:
    from vllm import SamplingParams

    (llm,) = _engines
    if counted:
        llm.collective_rpc("stem_reset_stats")
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    times = out.metrics
    return {
        "first_token_seconds": times.first_token_latency,
        "next_token_seconds": (times.last_token_ts - times.first_token_ts) / (tokens - 1) if tokens > 1 else None,
        "stats": llm.collective_rpc("stem_stats")[0] if counted else None,
    }
