"""The kernel that is compiled at first use: compilers, the cache, falling back, and the code of other CPUs."""

import ctypes
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cpu_backend import DTYPES, check, random_selection
from torch import Tensor

from helpers import make_qkv
from stem_attn import StemConfig, backends, block_sparse_attention, fallbacks
from stem_attn.backends.base import Geometry
from stem_attn.backends.cpu import build, native
from stem_attn.blocks import BlockSelection
from stem_attn.cache import CACHE_VARIABLE
from stem_attn.call import Call
from stem_attn.layout import Layout

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file to compile, and an empty cache folder."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def tool(folder: Path, script: str) -> Path:
    """Write an executable shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_compiler
def test_compiles_once_and_keeps_the_result(source, tmp_path, monkeypatch):
    library, reason = build.load(source)
    assert reason is None
    assert library.answer() == 42
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    assert kept.suffix == ".so"
    monkeypatch.setattr(build, "_compile", lambda command: pytest.fail("it compiles again"))
    assert build.load(source)[0].answer() == 42
    monkeypatch.setenv("PATH", "")  # a machine without a compiler uses what was compiled before
    assert build.load(source)[0].answer() == 42


@needs_compiler
def test_another_source_cpu_or_compiler_is_another_file(source, tmp_path, monkeypatch):
    build.load(source)
    source.write_text(SOURCE.replace("42", "43"))
    assert build.load(source)[0].answer() == 43
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    build.load(source)
    monkeypatch.setenv("CXX", COMPILER)
    build.load(source)
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 4


@needs_compiler
def test_a_kept_file_that_cannot_be_loaded_is_made_again(source, tmp_path):
    build.load(source)
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    kept.unlink()  # not overwritten: it is in this process's memory
    kept.write_bytes(b"of another system")
    assert build.load(source)[0].answer() == 42
    assert kept.read_bytes().startswith((b"\x7fELF", b"\xcf\xfa"))


@needs_compiler
@pytest.mark.parametrize("cache", ["a file in the way", "read-only", "no home"])
def test_without_a_cache_folder_it_is_compiled_for_the_process(source, tmp_path, monkeypatch, cache):
    if cache == "a file in the way":
        (tmp_path / "cache").write_text("")
    elif cache == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse)  # root may write into any folder
    else:
        monkeypatch.setattr(build, "cache_folder", homeless)
    scratch = tmp_path / "scratch"
    os.mkdir(scratch)
    monkeypatch.setattr(build.tempfile, "tempdir", str(scratch))
    library, reason = build.load(source)
    assert reason is None
    assert library.answer() == 42
    assert list(scratch.iterdir()) == []


def refuse(*args, **kwargs):
    raise PermissionError("read-only")


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    library, reason = build.load(source)
    assert library is None
    assert reason == "there is no C++ compiler: none of $CXX, c++, g++, clang++ is found"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'a.cpp:1: note: x'; echo 'a.cpp:2: error: no such header' >&2; exit 1",
            "a.cpp:2: error: no such header",
        ),
        ("exit 3", "exit code 3"),
        ('for last; do :; done; echo nonsense > "$last"', "cannot be loaded"),
    ],
)
def test_a_broken_compiler(source, tmp_path, monkeypatch, script, said):
    monkeypatch.setenv("CXX", str(tool(tmp_path, script)))
    library, reason = build.load(source)
    assert library is None
    assert said in reason
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@needs_compiler
def test_a_compiler_that_is_chosen_with_options_is_used(source, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"{COMPILER} -DUNUSED=1")
    assert build.load(source)[0].answer() == 42


@needs_compiler
def test_processes_that_compile_at_once(source, tmp_path):
    code = "import sys, pathlib\nfrom stem_attn.backends.cpu import build\n"
    code += "assert build.load(pathlib.Path(sys.argv[1]))[0].answer() == 42"
    env = os.environ | {"PYTHONPATH": str(Path(native.__file__).parents[3])}
    started = [subprocess.Popen([sys.executable, "-c", code, str(source)], env=env) for _ in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


# --- with and without ------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_machine_with_a_compiler_uses_the_kernel(monkeypatch):
    monkeypatch.delenv(native.SWITCH, raising=False)
    assert native.why_not() is None
    called = []
    monkeypatch.setattr(native, "attend_blocks", lambda *args, **kwargs: called.append(args[-1]))
    attend_something()
    assert called == [torch.get_num_threads()]
    assert backends.by_name("cpu").how() == "a kernel compiled for this CPU"


def attend_something() -> Tensor:
    q, k, v = make_qkv(100)
    return block_sparse_attention(q, k, v, random_selection(100, 100, 32), backend="cpu")


def test_without_the_kernel_it_says_so_once_and_counts(monkeypatch, caplog):
    expected = attend_something()
    monkeypatch.setattr(native, "_kernel", lambda: (None, "there is no compiler today"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(fallbacks, "_counts", type(fallbacks._counts)())
    caplog.set_level(logging.WARNING, "stem_attn")
    for _ in range(3):
        torch.testing.assert_close(attend_something(), expected, atol=2e-6, rtol=0)
    assert backends.fallbacks() == {"cpu: there is no compiler today": 3}
    assert [record.message for record in caplog.records] == [
        "the CPU backend computes in plain torch, which is slower (cpu: there is no compiler today)"
    ]
    assert backends.by_name("cpu").how() == "in plain torch, which is slower: there is no compiler today"


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("reason", [None, "there is no compiler today"])
def test_sparse_is_no_gain_where_dense_uses_matrix_units_and_the_kernel_is_missing(monkeypatch, tiles, reason):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(native, "why_not", lambda: reason)
    for dtype in DTYPES:
        expected = 0.0 if tiles and reason and dtype == torch.bfloat16 else 0.5
        assert backends.by_name("cpu").break_even(Geometry("cpu", dtype, 64, 8192), StemConfig()) == expected


def test_what_another_device_gains_does_not_depend_on_the_hosts_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(native, "why_not", lambda: pytest.fail("it compiles"))
    geometry = Geometry("xpu", torch.bfloat16, 64, 8192)
    assert backends.by_name("cpu").break_even(geometry, StemConfig()) == 0.5


def test_the_switch_forbids_to_compile(monkeypatch):
    monkeypatch.setattr(native, "_kernel", lambda: pytest.fail("it compiles"))
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.why_not() == "STEM_ATTN_NATIVE=0 forbids to compile the kernel"
    attend_something()


def test_what_the_kernel_does_not_take_is_no_fallback(monkeypatch):
    monkeypatch.setattr(native, "_kernel", lambda: pytest.fail("it compiles"))
    before = backends.fallbacks()
    q, k, v = make_qkv(100, dtype=torch.float64)
    check(q, k, v, random_selection(100, 100, 32))
    assert backends.fallbacks() == before


# --- the kernel ------------------------------------------------------------------------------------------------------


CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
EMULATED_TILES = f"-D__AMX_TILE__ -D__AMX_BF16__ -include '{Path(__file__).with_name('tiles.h')}'"
NO_TILES = "-mno-amx-bf16" if "amx_bf16" in CPU else ""


@pytest.fixture(params=dict.fromkeys(["", NO_TILES, EMULATED_TILES, "-mno-avx512f", "-mno-avx"]))
def kernel(request, tmp_path, monkeypatch) -> None:
    """The kernel as it is compiled for this CPU, for one with tiles, and for older ones."""
    use_kernel(request.param, tmp_path, monkeypatch)


def use_kernel(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    if COMPILER is None or (flags and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip("needs a C++ compiler for x86")
    if flags.startswith(EMULATED_TILES) and "avx512_bf16" not in CPU:
        pytest.skip("needs a CPU that multiplies pairs of bfloat16")
    if flags:
        monkeypatch.setenv("CXX", str(tool(tmp_path, f'exec {COMPILER} "$@" {flags}')))
        monkeypatch.setenv(CACHE_VARIABLE, str(Path(torch.__file__).parent / "no such folder" / "x"))
    if flags not in _KERNELS:
        native._kernel.cache_clear()
        _KERNELS[flags] = native._kernel()
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "_kernel", lambda: _KERNELS[flags])
    assert native.why_not() is None
    return _KERNELS[flags][0]


_KERNELS: dict[str, tuple[ctypes.CDLL | None, str | None]] = {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_len", "k_len", "dim", "v_dim", "size"),
    [
        (1, 1, 8, 8, 16),
        (1, 300, 64, 64, 32),
        (333, 400, 7, 5, 48),
        (130, 131, 33, 80, 16),
        (700, 700, 128, 128, 128),
        (250, 250, 96, 48, 64),
        (500, 777, 72, 16, 300),  # blocks larger than what is computed at a time
    ],
)
def test_shapes(kernel, dtype, q_len, k_len, dim, v_dim, size):
    q, k, v = make_qkv(q_len, k_len, batch=2, dim=dim, v_dim=v_dim, dtype=dtype)
    check(q, k, v, random_selection(q_len, k_len, size, batch=2, per_head=True))


@pytest.mark.parametrize("window", [1, 31, 129, 10**12])
def test_windows(kernel, window):
    q, k, v = make_qkv(600, 650)
    check(q, k, v, random_selection(600, 650, 64), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks(kernel, dtype, softcap):
    """A sink takes its share of the softmax's sum, which the log-sum-exp without it tells."""
    q, k, v = make_qkv(260, 300, dim=40, v_dim=20, dtype=dtype)
    sinks, selection = torch.tensor([-math.inf, 0.0, 3.0, 80.0]), random_selection(260, 300, 64)
    how = {"softcap": softcap, "return_lse": True, "backend": "cpu"}
    plain, plain_lse = block_sparse_attention(3 * q, k, v, selection, **how)
    out, lse = block_sparse_attention(3 * q, k, v, selection, sinks=sinks, **how)
    left = torch.sigmoid(plain_lse - sinks[:, None])[..., None]
    torch.testing.assert_close(out.float(), plain.float() * left, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=1e-6)
    torch.testing.assert_close(lse, plain_lse.logaddexp(sinks[:, None]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [2, 123])
def test_any_strides(kernel, dtype, last):
    """The same numbers with dims that are `last` numbers apart, and rows that are the closer for it."""
    tensors = make_qkv(100, 120, dim=40, v_dim=35, dtype=dtype)
    selection = random_selection(100, 120, 32)
    call, expected = Call(Layout.dense(*tensors), 32, 0.2), torch.empty(1, 4, 100, 35, dtype=dtype)
    native.attend_blocks(call, *tensors, selection, expected, None, threads=1)

    def spread(x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        row = 1 if last > tokens else last * dim
        room = torch.full((batch, heads, last * dim * (1 if row == 1 else tokens)), torch.nan, dtype=dtype)
        return room.as_strided(x.shape, (*room.stride()[:2], row, last)).copy_(x)

    out = spread(torch.zeros_like(expected))
    native.attend_blocks(call, *map(spread, tensors), selection, out, None, threads=1)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_and_scales_of_any_sign(kernel, dtype):
    q, k, v = make_qkv(400, dim=64, dtype=dtype)
    for scale in (-0.5, 2.0):
        check(q, k, v, random_selection(400, 400, 64), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [20, 40])
def test_keys_that_are_no_numbers_leave_nothing_in_the_memory_of_a_thread(kernel, dtype, dim):
    q, k, v = make_qkv(75, dim=dim, dtype=dtype)  # dims and keys fill up neither vectors nor tiles
    selection = random_selection(75, 75, 32)
    expected, out = torch.empty_like(q), torch.empty_like(q)
    native.attend_blocks(Call(Layout.dense(q, k, v), 32, 0.2), q, k, v, selection, expected, None, threads=1)
    k[:, 0] = v[:, 0] = torch.nan
    native.attend_blocks(Call(Layout.dense(q, k, v), 32, 0.2), q, k, v, selection, out, None, threads=1)
    assert out[:, :2].isnan().all()
    assert torch.equal(out[:, 2:], expected[:, 2:])


def test_half_precisions_are_rounded_as_torch_rounds_them(kernel):
    """One key: its weight is 1, so every value comes out as it went in, the extremes and the tiny ones too."""
    for dtype in (torch.float16, torch.bfloat16):
        v = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, 256, 1, 256)
        q = k = torch.ones(1, 256, 1, 4, dtype=dtype)
        out = block_sparse_attention(q, k, v, random_selection(1, 1, 16, heads=256), backend="cpu")
        tiny = v.isfinite() & (v.abs() < torch.finfo(dtype).tiny)
        exact = torch.where(tiny & (out == 0), 0, v) if dtype == torch.bfloat16 else v  # products of pairs drop them
        assert torch.equal(out.nan_to_num(nan=7), exact.nan_to_num(nan=7))
    # Between two numbers of the dtype: the mean of values, over two keys of equal weight.
    for dtype in (torch.float16, torch.bfloat16):
        gen = torch.Generator().manual_seed(0)
        v = torch.randn(1, 2, 2, 4000, generator=gen).to(dtype)
        v[:, :, :, ::3] *= 2.0**-14
        q = k = torch.zeros(1, 2, 2, 4, dtype=dtype)
        out = block_sparse_attention(q, k, v, random_selection(2, 2, 16, heads=2), backend="cpu")
        assert torch.equal(out[:, :, 1], v.double().mean(2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_threads_batch_or_company(kernel, dtype):
    q, k, v = make_qkv(300, 400, batch=3, dtype=dtype)
    selection = random_selection(300, 400, 32, batch=3, per_head=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, expected_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="cpu")
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(3) as pool:
                calls = [
                    pool.submit(block_sparse_attention, q, k, v, selection, return_lse=True, backend="cpu")
                    for _ in range(6)
                ]
            for call in calls:
                out, lse = call.result()
                assert torch.equal(out, expected)
                assert torch.equal(lse, expected_lse)
    finally:
        torch.set_num_threads(before)
    for i in range(3):
        here = slice(i, i + 1)
        one = BlockSelection.made(selection.indices[here], selection.counts[here], selection.grid)
        assert torch.equal(block_sparse_attention(q[here], k[here], v[here], one, backend="cpu"), expected[here])


def attend_here(dim: int = 64) -> tuple[Tensor, Tensor]:
    """Compute in bfloat16 on this thread and another."""
    q, k, v = make_qkv(300, dim=dim, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    selection = random_selection(300, 300, 64)
    native.attend_blocks(Call(Layout.dense(q, k, v), 64, 0.125), q, k, v, selection, out, lse, threads=2)
    return out, lse


def test_a_thread_keeps_its_own_configuration_of_the_tiles(tmp_path, monkeypatch):
    """Other libraries set the tiles up too, and need not do it anew."""
    library = use_kernel(EMULATED_TILES, tmp_path, monkeypatch)
    attend_here()  # the system has been asked
    mine = bytes([1, 0, *[0] * 14, *[32, 0] * 8, *[0] * 16, *[7] * 8, *[0] * 8])
    for config in (bytes(64), mine):
        found = ctypes.create_string_buffer(64)
        library.write_tile_config(config)
        attend_here()
        library.read_tile_config(found)
        assert found.raw == config


def test_a_system_that_refuses_the_tiles_gets_the_vectors(tmp_path, monkeypatch):
    with monkeypatch.context() as own:
        use_kernel(f"{EMULATED_TILES} -DEMULATED_REFUSAL", tmp_path, own)
        out, lse = attend_here()
    use_kernel(NO_TILES, tmp_path, monkeypatch)
    expected, expected_lse = attend_here()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_no_thread_is_left_and_the_lock_is_free_meanwhile(kernel):
    q, k, v = make_qkv(4000, heads=8, kv_heads=2, dim=64)
    selection = random_selection(4000, 4000, 128, heads=8)
    out = torch.empty_like(q)
    asked = Call(Layout.dense(q, k, v), 128, 0.125)
    ended = threading.Event()

    def attend() -> None:
        native.attend_blocks(asked, q, k, v, selection, out, None, threads=3)
        ended.set()

    attend()
    tasks = Path("/proc/self/task")
    before = sorted(os.listdir(tasks)) if tasks.exists() else []
    ended.clear()
    thread = threading.Thread(target=attend)
    thread.start()
    turns = 0
    while not ended.is_set():
        turns += 1
    thread.join()
    assert turns > 100
    deadline = time.monotonic() + 10  # one that has been joined may still be listed
    while tasks.exists() and sorted(os.listdir(tasks)) != before:
        assert time.monotonic() < deadline


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_calling_thread_that_is_bound_to_one_cpu_does_not_bind_the_kernels_threads():
    """As vLLM binds each of OpenMP's threads to a CPU of its own."""
    code = """
import os, sys, threading, torch
from stem_attn import BlockSelection, block_sparse_attention
from stem_attn.blocks import BlockGrid
cpus = sorted(os.sched_getaffinity(0))
torch.set_num_threads(2)
torch.ones(1 << 20).exp_()  # OpenMP's threads exist
others = [int(thread) for thread in os.listdir("/proc/self/task") if int(thread) != os.getpid()]
os.sched_setaffinity(0, {cpus[0]})
for thread in others:
    os.sched_setaffinity(thread, {cpus[1]})
q = torch.randn(1, 8, 4000, 64)
selection = BlockSelection.everything(batch=1, heads=8, grid=BlockGrid(4000, 4000, 128), device="cpu")
attend = lambda: block_sparse_attention(q, q, q, selection, backend="cpu")
attend()  # Python's worker exists
known = set(os.listdir("/proc/self/task"))
ended = threading.Event()
seen = []
def watch():
    known.add(str(threading.get_native_id()))
    while not ended.is_set():
        for thread in set(os.listdir("/proc/self/task")) - known:
            try:
                seen.append(len(os.sched_getaffinity(int(thread))))
            except ProcessLookupError:
                pass
watcher = threading.Thread(target=watch)
watcher.start()
attend()
ended.set()
watcher.join()
assert seen and set(seen) == {2}, seen
assert len(os.sched_getaffinity(0)) == 1
"""
    env = os.environ | {"PYTHONPATH": str(Path(native.__file__).parents[3]), "OMP_NUM_THREADS": "2"}
    env.pop(native.SWITCH, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner here")
@pytest.mark.parametrize("open_to_others", ["folder", "file"])
def test_what_others_may_write_is_not_loaded(open_to_others, source, tmp_path):
    assert build.load(source)[1] is None
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    kept.unlink()  # it is mapped into this process
    kept.write_bytes(b"another's")
    (kept.parent if open_to_others == "folder" else kept).chmod(0o777)
    assert build.load(source)[0].answer() == 42  # compiled anew
    assert (kept.read_bytes() == b"another's") == (open_to_others == "folder")
