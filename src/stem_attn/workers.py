"""Worker threads for plain torch on a CPU: every thread takes whole jobs and runs them on one core.

Torch splits each operation over its threads and waits at the operation's end. A chain of small operations waits
hundreds of times, each time for the slowest thread, and beside another program's busy loops that is one that does not
run at all. Here a call waits once, and a thread that is held up leaves the jobs that remain to the others.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

import torch


def run_jobs(count: int, start: Callable[[], Callable[[int], None]], device: torch.device) -> None:
    """Run jobs 0 to count - 1, in order of their numbers, on as many threads as torch uses on this one.

    Args:
        count: Jobs.
        start: Called once by every thread; makes what the thread needs, and returns what runs a job of a number.
        device: Of the tensors. On another than a CPU the calling thread runs all jobs.

    Raises:
        Exception: What a job raised first; jobs that were not begun then are left out.
    """
    threads = min(torch.get_num_threads(), count) if device.type == "cpu" else 1
    if threads < 2:
        run = start()
        for job in range(count):
            run(job)
        return
    jobs = deque(range(count))
    inference = torch.is_inference_mode_enabled()  # of this thread alone

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                run = start()
                while True:
                    try:
                        job = jobs.popleft()
                    except IndexError:
                        return
                    run(job)
        except BaseException:
            jobs.clear()
            raise

    running: list[Future[None]] = []
    try:
        pool = _pool(os.getpid(), _cpus(threads))
        running.extend(pool.submit(work) for _ in range(threads))
        wait(running)
    finally:
        jobs.clear()  # an interrupt: nobody may write after the call has ended
        wait(running)
    for future in running:
        future.result()


@cache
def _pool(process: int, cpus: frozenset[int]) -> ThreadPoolExecutor:
    """Return the threads of a process that run on some CPUs; a fork's child has none of its parent's.

    They are made when they are needed, and as many as calls at the same time need.
    """
    lock = threading.Lock()

    def set_up() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        with lock:
            # torch keeps a number of threads for each thread, and one more for threads that are yet to begin.
            others = torch.get_num_threads()
            torch.set_num_threads(1)
            restore = threading.Thread(target=torch.set_num_threads, args=(others,))
            restore.start()
            restore.join()

    return ThreadPoolExecutor(max_workers=1024, thread_name_prefix="stem-attn", initializer=set_up)


def _cpus(threads: int) -> frozenset[int]:
    """Return the CPUs for so many threads; empty where the system cannot tell.

    They are those of the calling thread, unless OpenMP has bound that to a single one. Then they are the CPUs that
    OpenMP has bound any of its threads to.
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
