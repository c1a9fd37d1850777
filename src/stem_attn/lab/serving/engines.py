"""vLLM engines, each in a process of its own: start one, ask it, stop it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
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

    def answer(self, ids: list[int], tokens: int, asked: Record) -> Record:
        """Answer a prompt greedily; tell how long it took, and what Stem did if it counts.

        Args:
            ids: The prompt's tokens.
            tokens: Of the answer.
            asked: The request's `extra_args`.
        """
        return self._pool.submit(_answer, ids, tokens, asked, self._counted).result()


@contextmanager
def running_engines(options: Mapping[str, Record], *, at_once: bool) -> Iterator[dict[str, Engine]]:
    """Start engines with vLLM's options, and stop them at the end of a `with` block.

    Args:
        options: Of `vllm.LLM`, by a name for each engine. Stem counts where its worker extension is among them.
        at_once: Start them at the same time; else one after the other, as they must where each measures what memory
            the others have left.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in options}
        started = []
        for name, pool in pools.items():
            stack.callback(_ask_to_stop, pool)
            started.append(pool.submit(_start, options[name]))
            if not at_once:
                started[-1].result()
        for engine in started:
            engine.result()
        yield {name: Engine(pool, "worker_extension_cls" in options[name]) for name, pool in pools.items()}


def _ask_to_stop(pool: ProcessPoolExecutor) -> None:
    pool.submit(_stop).result()


def _start(options: Record) -> None:
    from vllm import LLM

    _engines.append(LLM(**options))


def _stop() -> None:
    """Stop this process's engine if it has started: its own processes would keep this one from ending."""
    if _engines:
        _engines.pop().llm_engine.engine_core.shutdown()


def _answer(ids: list[int], tokens: int, asked: Record, counted: bool) -> Record:
    from vllm import SamplingParams

    (llm,) = _engines
    if counted:
        llm.collective_rpc("stem_reset_stats")
    greedy = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=asked or None
    )
    (out,) = llm.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)
    times = out.metrics
    return {
        "first_token_seconds": times.first_token_latency,
        "next_token_seconds": (times.last_token_ts - times.first_token_ts) / (tokens - 1) if tokens > 1 else None,
        "stats": llm.collective_rpc("stem_stats")[0] if counted else None,
    }
