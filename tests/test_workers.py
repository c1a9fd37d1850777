"""Worker threads: results, and what must not leak out of a call."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from helpers import SMALL, make_qkv
from stem_attn import block_sparse_attention, select_blocks, stem_attention
from stem_attn.blocks import BlockGrid
from stem_attn.scoring import block_scores
from stem_attn.selection import select_top_blocks
from stem_attn.workers import on_worker, run_jobs

CPU = torch.device("cpu")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def share(count, start):
    on_worker(lambda: run_jobs(count, start), CPU)


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def call(batch=2):
    q, k, v = make_qkv(300, 400, batch=batch)
    out, selection = stem_attention(q, k, v, config=SMALL, backend="cpu", return_selection=True)
    return out, selection.indices


def test_every_job_runs_once_on_threads_with_one_intra_op_thread():
    seen = []

    def start():
        me = threading.get_ident()

        def run(job):
            time.sleep(0.001)
            seen.append((job, me, torch.get_num_threads()))

        return run

    share(50, start)
    assert sorted(job for job, _, _ in seen) == list(range(50))
    assert {threads for _, _, threads in seen} == {1}
    assert 2 <= len({me for _, me, _ in seen}) <= 3
    assert threading.get_ident() not in {me for _, me, _ in seen}


def test_with_one_thread_the_caller_works():
    torch.set_num_threads(1)
    seen = []
    share(20, lambda: lambda job: seen.append((job, threading.get_ident())))
    assert seen == [(job, threading.get_ident()) for job in range(20)]


def test_the_first_error_ends_the_call_and_the_next_call_works():
    done = []

    def run(job):
        if job == 5:
            raise ValueError("job 5")
        time.sleep(0.002)
        done.append(job)

    with pytest.raises(ValueError, match="job 5"):
        share(1000, lambda: run)
    finished = len(done)
    assert finished < 100
    time.sleep(0.02)
    assert len(done) == finished  # nobody works on after the call
    call()


def test_an_error_where_a_thread_begins_is_raised():
    def start():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        share(10, start)


@pytest.mark.parametrize("fails", [False, True])
def test_no_number_of_threads_is_left_changed(fails):
    assert threads_of_a_new_thread() == 3

    def run(job):
        if fails:
            raise ValueError

    for _ in range(20):
        try:
            share(8, lambda: run)
        except ValueError:
            assert fails
        assert torch.get_num_threads() == 3
        deadline = time.monotonic() + 5  # a worker may still be starting, and new threads see its number until it has
        while threads_of_a_new_thread() != 3:
            assert time.monotonic() < deadline


@pytest.mark.usefixtures("way")
def test_modes_of_the_calling_thread_reach_the_workers():
    modes = []
    with torch.inference_mode():
        share(8, lambda: lambda job: modes.append(torch.is_inference_mode_enabled()))
        call()
    assert modes == [True] * 8
    modes.clear()
    share(8, lambda: lambda job: modes.append(torch.is_grad_enabled() or torch.is_inference_mode_enabled()))
    assert modes == [False] * 8


@pytest.mark.usefixtures("way")
def test_results_do_not_depend_on_the_number_of_threads():
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(call())
    for out, indices in results[1:]:
        assert torch.equal(indices, results[0][1])
        torch.testing.assert_close(out, results[0][0], atol=2e-6, rtol=0)


@pytest.mark.usefixtures("way")
def test_calls_at_once_from_many_threads_agree():
    expected, expected_indices = call()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(call) for _ in range(24)]
    for future in futures:
        out, indices = future.result()
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


class Prompts(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index % 2:
            torch.set_num_threads(2)  # a worker process has one
        return call(batch=1)[0][0]


@pytest.mark.usefixtures("way")
def test_in_workers_of_a_data_loader():
    expected = call(batch=1)[0][0]  # this process has its threads when the others are forked
    for out in DataLoader(Prompts(), batch_size=None, num_workers=2, multiprocessing_context="fork"):
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("way")
def test_after_a_fork():
    expected = call()[0]
    child = os.fork()
    if not child:
        status = 1
        try:
            out = call()[0]
            torch.set_num_threads(1)  # torch's own threads are gone, and it does not notice
            status = 0 if (out - expected).abs().max() < 2e-6 else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    call()  # and the parent goes on


@pytest.mark.skipif(CPUS < 2, reason="needs two CPUs, and a system that binds threads to them")
@pytest.mark.parametrize("bind", ["openmp", "threads"])
def test_a_calling_thread_that_is_bound_to_one_cpu_does_not_bind_the_workers_to_it(bind):
    """OpenMP's own binding, and that of vLLM, which binds each of OpenMP's threads to a CPU of its own."""
    code = """
import os, sys, torch
from stem_attn.workers import on_worker, run_jobs
cpus = sorted(os.sched_getaffinity(0))
torch.set_num_threads(2)
torch.ones(1 << 20).exp_()  # OpenMP's threads exist
if sys.argv[1] == "threads":
    others = [int(thread) for thread in os.listdir("/proc/self/task") if int(thread) != os.getpid()]
    os.sched_setaffinity(0, {cpus[0]})
    for thread in others:
        os.sched_setaffinity(thread, {cpus[1]})
assert len(os.sched_getaffinity(0)) == 1
seen = []
start = lambda: lambda job: seen.append(len(os.sched_getaffinity(0)))
on_worker(lambda: run_jobs(8, start), torch.device("cpu"))
assert seen == [2] * 8, seen
assert len(os.sched_getaffinity(0)) == 1
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "2"}
    if bind == "openmp":
        env |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    done = subprocess.run([sys.executable, "-c", code, bind], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("score", ["linear", "mass"])
@pytest.mark.parametrize("residual", ["none", "mean"])
def test_defaults_of_the_process_do_not_leak_in(score, residual):
    """The default dtype is the process's, the default device the calling thread's; neither may change a result."""
    config = dataclasses.replace(SMALL, score=score, residual=residual, value_term="zscore")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        q, k, v = make_qkv(301, 410)
        selection = select_blocks(q, k, v, config=config)  # the budget is cached now
        expected = block_sparse_attention(q, k, v, selection, residual=residual, return_lse=True, backend="cpu")
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            try:
                torch.set_default_dtype(dtype)
                assert torch.equal(select_blocks(q, k, v, config=config).indices, selection.indices)
                outs = block_sparse_attention(q, k, v, selection, residual=residual, return_lse=True, backend="cpu")
            finally:
                torch.set_default_dtype(torch.float32)
            assert all(torch.equal(out, same) for out, same in zip(outs, expected, strict=True))
        with torch.device("meta"):
            again = block_sparse_attention(q, k, v, selection, residual=residual, return_lse=True, backend="cpu")
        assert all(torch.equal(out, same) for out, same in zip(again, expected, strict=True))
        scores = torch.randn(1, 4, 26, 26)
        grid, budget = BlockGrid(410, 410, 16), torch.full((26,), 5, dtype=torch.int32)
        with torch.device("meta"):
            assert block_scores(q, k, v, config, 0.2).device.type == "cpu"
            assert select_top_blocks(scores, budget, grid, config, 2).indices.device.type == "cpu"
