"""Tests of the vLLM plugin on real engines. They have an environment of their own: `make test-vllm`."""

import functools
import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]  # the main environment has no vLLM: its torch is another one

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, so that tests can look into it
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)


@pytest.fixture(scope="session", autouse=True)
def _several_engines_in_one_process():
    """Let vLLM register its kernels once: 0.32 stumbles over numba's objects when it does so again."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if hasattr(platform, "register_triton_kernel_overrides"):  # 0.26 has none
        once = functools.cache(platform.register_triton_kernel_overrides)
        platform.register_triton_kernel_overrides = staticmethod(once)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of a tiny model of a family, made at first use."""
    from tiny_families import save

    made = {}

    def folder(family):
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def pytest_terminal_summary(terminalreporter):
    """Print what tests measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
