"""The tanh of a softcap against float64."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("stem_attn.backends.triton.tanh_kernel")
tanh = kernels.tanh

GPU = torch.cuda.is_available()
HOW = ["exact", "short", "fast"] if GPU and torch.version.hip is None else ["exact", "short"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's


@triton.jit
def kernel(x, y, n: tl.constexpr, how: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, tanh(tl.load(x + at), how))


@pytest.mark.parametrize("how", HOW)
def test_its_error_is_what_is_said(how):
    ends = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.logspace(-30, 1.5, 4092), ends])
    x = x.cuda() if GPU else x
    y = torch.empty_like(x)
    kernel[(1,)](x, y, len(x), how)
    expected = x.double().tanh()
    assert torch.equal(y.isnan(), expected.isnan())
    bound = {"exact": 2**-21 * expected.abs(), "short": 2**-22, "fast": 2**-10.9 * expected.abs()}[how]
    assert bool(((y - expected).abs() <= bound)[:-1].all())
