"""Worker threads for plain torch on a CPU: every thread takes whole jobs and runs them on one core.

Torch splits each operation over its threads and waits at the operation's end. A chain of small operations waits
hundreds of times, each time for the slowest thread, and beside another program's busy loops that is one that does not
run at all. Here a call waits once or twice, and a thread that is held up leaves the jobs that remain to the others.

All of a call runs on such threads, for OpenMP's own do not survive a fork.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(slots=True)
class _Team:
    """The threads of one call."""

    pool: ThreadPoolExecutor
    threads: int
    cores_each: int  # that torch uses for one operation of a thread
    inference: bool  # of the calling thread; torch keeps it for each
    stopped: bool = False


# Only one thread at a time may run Python: with more than these, they wait for one another (docs/log.md). Then two
# share the jobs, and torch splits each operation over the cores that each of them has.
_MOST_ALONE = 4
_here = threading.local()  # .team: of the call that this thread leads


def on_worker(function: Callable[[], T], device: torch.device) -> T:
    """Call a function on a worker thread; its `run_jobs` then share their jobs among as many as torch uses here.

    Args:
        function: Takes nothing.
        device: Of the tensors. On another than a CPU, or if torch uses one thread, the calling thread does all.

    Returns:
        What the function returns.

    Raises:
        Exception: What the function raises.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads < 2:
        return function()
    members = threads if threads <= _MOST_ALONE else 2
    each = threads // members
    team = _Team(_pool(os.getpid(), _cpus(), each), members, each, torch.is_inference_mode_enabled())

    def lead() -> T:
        _here.team = team
        try:
            with torch.inference_mode(team.inference), torch.no_grad():
                return function()
        finally:
            del _here.team

    leader = team.pool.submit(lead)
    try:
        return leader.result()
    except BaseException:
        team.stopped = True  # an interrupt: nobody may write after the call has ended
        wait([leader])
        raise


def run_jobs(count: int, start: Callable[[], Callable[[int], None]]) -> None:
    """Run jobs 0 to count - 1, begun in this order, on the threads of the call's team, or else on this one.

    Args:
        count: Jobs.
        start: Called once by every thread; makes what the thread needs, and returns what runs a job of a number.

    Raises:
        Exception: What a job raised; jobs that were not begun then are left out.
    """
    team: _Team | None = getattr(_here, "team", None)
    jobs = deque(range(count))

    def work() -> None:
        try:
            run = start()
            while not (team and team.stopped):
                try:
                    job = jobs.popleft()
                except IndexError:
                    return
                run(job)
        except BaseException:
            jobs.clear()
            raise

    def help_out(team: _Team) -> None:
        with torch.inference_mode(team.inference), torch.no_grad():
            work()

    helpers: list[Future[None]] = []
    if team:
        helpers.extend(team.pool.submit(help_out, team) for _ in range(min(team.threads, count) - 1))
    try:
        work()
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


def team_size() -> int:
    """Return how many threads share this thread's jobs."""
    team: _Team | None = getattr(_here, "team", None)
    return team.threads if team else 1


def cores_each() -> int:
    """Return how many cores torch uses for one operation of this thread's jobs."""
    team: _Team | None = getattr(_here, "team", None)
    return team.cores_each if team else 1


@cache
def _pool(process: int, cpus: frozenset[int], cores: int) -> ThreadPoolExecutor:
    """Return the threads of a process that run on some CPUs, and use so many of them for an operation.

    A fork's child has none of its parent's.

    They are made when they are needed, and as many as calls at the same time need.
    """
    lock = threading.Lock()

    def set_up() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        with lock:
            # torch keeps a number of threads for each thread, and one more for threads that are yet to begin.
            others = torch.get_num_threads()
            torch.set_num_threads(cores)
            restore = threading.Thread(target=torch.set_num_threads, args=(others,))
            restore.start()
            restore.join()

    return ThreadPoolExecutor(max_workers=1024, thread_name_prefix="stem-attn", initializer=set_up)


def _cpus() -> frozenset[int]:
    """Return the CPUs for this thread's workers; empty where the system cannot tell.

    They are its own, unless OpenMP has bound it to a single one. Then they are the CPUs that OpenMP has bound any of
    its threads to.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    own = frozenset(os.sched_getaffinity(0))
    return own if len(own) > 1 else _bound_cpus(os.getpid(), own)


@cache
def _bound_cpus(process: int, own: frozenset[int]) -> frozenset[int]:
    bound = set(own)
    for thread in os.listdir("/proc/self/task"):
        try:
            cpus = os.sched_getaffinity(int(thread))
        except ProcessLookupError:  # it has just ended
            continue
        if len(cpus) == 1:
            bound |= cpus
    return frozenset(bound)
