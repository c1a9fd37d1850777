import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# Triton reads this when it is first imported, and some test's imports import it. With a GPU its kernels run there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The backend imports these at its first call. Were that in a test that has patched a name which they take from
# `attention`, they would keep the patch, and later tests would run another kernel than they say.
with contextlib.suppress(ModuleNotFoundError):
    from stem_attn.backends.triton import attention, exact_rows, fp8, prepared, residual, selection  # noqa: F401


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    """Both ways of the CPU backend: its compiled kernel, and what machines without a compiler run."""
    from stem_attn.backends.cpu import native

    monkeypatch.setenv(native.SWITCH, "1" if request.param == "native" else "0")
    if request.param == "native" and native.why_not():
        pytest.skip(native.why_not())
    return request.param


@pytest.fixture(autouse=True)
def no_hoard_of_device_memory():
    """Give a large test's device memory back: the tests of other processes share the GPU."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()
