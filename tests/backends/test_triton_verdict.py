"""What an audit's rows come to, by the kernels and by plain torch: on a GPU, or in Triton's CPU interpreter."""

import math

import pytest
import torch

from stem_attn import PrefillPolicy
from stem_attn.audit import AuditSums
from stem_attn.backends.triton import TritonBackend
from stem_attn.exact_rows import add_up

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = TritonBackend()
ROWS = 400


def found_rows(batch, heads, rows, seed=0):
    return torch.rand(3, batch, heads, rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "q_len"), [(1, 4, 16, 1024), (2, 3, 6, 1000), (1, 1, 2, 1), (1, 40, 66, 70_001)]
)
def test_sums_are_those_of_plain_torch(batch, heads, rows, q_len):
    found = found_rows(batch, heads, rows)
    torch.testing.assert_close(BACKEND.add_up(found, q_len), add_up(found, q_len), rtol=1e-12, atol=0)


def test_sums_of_what_is_no_number():
    found = found_rows(1, 4, 16)
    found[:2, 0, 1, 3] = math.nan
    by_kernel = BACKEND.add_up(found, 1024)
    torch.testing.assert_close(by_kernel, add_up(found, 1024), rtol=1e-12, atol=0, equal_nan=True)
    assert by_kernel.isnan().tolist() == [True, False, False, True, False, False, False]


def verdict(values, queries=1000, **target):
    values = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    asked = {"min_recall": None, "max_error": None} | target
    return bool(BACKEND.misses(values, queries, ROWS, *asked.values()))


@pytest.mark.parametrize("freedom", [1, 3, 30])
def test_the_verdict_turns_where_the_limits_that_are_read_do(freedom):
    """Variances of so many equal cells, from one that tells nothing to many."""
    for share, spread in ((0.99, 0.001), (0.9, 0.02), (0.999, 0.0)):
        variance, lost = (spread * 1000) ** 2, (spread * 8.0) ** 2
        values = [share * 1000, variance, variance**2 / freedom, (1 - share) * 8, 8.0, lost, lost**2 / freedom]
        sums = AuditSums(1000, ROWS, torch.tensor(values, dtype=torch.float64)).read()
        for off, missed in ((-1e-5, False), (1e-5, True)):
            assert verdict(values, min_recall=sums.recall.low + off) is missed
            assert verdict(values, max_error=sums.error.high - off) is missed
            assert verdict(values, min_recall=sums.recall.low + off, max_error=9.0) is missed
            assert verdict(values, min_recall=0.5, max_error=sums.error.high - off) is missed
        assert not verdict(values)


@pytest.mark.parametrize("target", [{"min_recall": 0.9}, {"max_error": 0.5}, {"min_recall": 0.9, "max_error": 0.5}])
@pytest.mark.parametrize(
    "values",
    [
        [1000.0 + 1e-9, 0, 0, 0, 0, 0, 0],  # rounding, and values of zero
        [math.nan, 0, 0, 0, 1, 0, 0],
        [1000, 0, 0, math.nan, 1, 0, 0],
        [1000, 0, 0, 0, math.nan, 0, 0],
        [1000, math.inf, math.inf, 0, 1, 0, 0],
        [1000, 0, 0, math.inf, math.inf, 0, 0],
        [1000, 0, 0, 1e78, 1e80, 0, 0],  # too large to be squared twice
        [1000, 0, 0, 1e-86, 1e-84, 0, 0],  # too small
        [1000, 0, 0, 0, 1e80, 1e300, math.inf],
        [1000, 0, 0, 1e-302, 1e-300, 0, 0],
    ],
)
def test_limits_that_are_no_numbers_miss_as_on_the_host(values, target):
    sums = AuditSums(1000, ROWS, torch.tensor(values, dtype=torch.float64))
    policy = PrefillPolicy(audit_rows=ROWS, **target)
    assert verdict(values, **target) is policy.misses(sums.read())


@pytest.mark.parametrize("spread", [0.0, 500.0, math.inf, math.nan])
def test_a_recall_of_nothing_misses_only_what_is_no_number(spread):
    """The lower limit of a recall is 0 at least, however wide the interval."""
    values = [100, spread**2, spread**4, 0, 1, 0, 0]
    policy = PrefillPolicy(audit_rows=ROWS, min_recall=0.0)
    sums = AuditSums(1000, ROWS, torch.tensor(values, dtype=torch.float64))
    assert verdict(values, min_recall=0.0) is policy.misses(sums.read()) is not math.isfinite(spread)
