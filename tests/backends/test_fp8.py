"""8-bit products: the rounding kernels on a GPU or in Triton's interpreter, attention on a Hopper GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import make_qkv
from stem_attn import (
    BlockSelection,
    StemConfig,
    block_sparse_attention,
    stem_attention,
    stem_attention_paged,
    stem_attention_varlen,
)
from stem_attn.backends import fallbacks
from stem_attn.backends.triton import TritonBackend
from stem_attn.backends.triton.tiles import choose_fp8_tile
from stem_attn.blocks import BlockGrid
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention

pytest.importorskip("triton", minversion="3.6")
GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if GPU else "cpu"
BLOCK = 128
BLOCKS = [64, 128]
SHAPES = [(128, 128), (64, 64), (128, 64), (256, 128), (256, 64)]  # head dims, tokens a block
E4M3 = torch.float8_e4m3fn
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
DTYPES = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's


@pytest.fixture(autouse=True)
def _rounding_that_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to e4m3 as GPUs do; the interpreter loses the carry of 1.9999 to 2."""
    if GPU:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if target.name != "fp8e4nv":
            return convert(data, source, target, mode)
        return torch.from_numpy(data.view("float32").copy()).to(E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def values_of(v: Tensor, dims: int) -> Tensor:
    """Undo the transposition of the blocks of values [B, H, blocks * dims, block], and the order of their keys."""
    slot = torch.arange(v.shape[3])
    key = slot // 16 * 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2
    blocks = v.float().cpu().unflatten(2, (-1, dims))
    return blocks[..., key.argsort()].transpose(3, 4).flatten(2, 3)


def rotated(x: Tensor) -> Tensor:
    """Rotate queries or keys: signs, then a Hadamard matrix, over runs of up to 128 dims of a power of two."""
    dims = max(64, 1 << (x.shape[3] - 1).bit_length())
    run = min(dims, 128)
    d = torch.arange(run)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < run:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = 1 - 2 * (d * d * 5 // 8 % 2)
    runs = F.pad(x.double().cpu(), (0, dims - x.shape[3])).unflatten(3, (-1, run))
    return (runs @ (signs[:, None] * hadamard) * run**-0.5).flatten(3)


def rounded_by_torch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Prepare q, k and v in plain torch; return numbers that e4m3 holds, not rounded, and then the three scales."""
    k = k.double().cpu()
    k = k - k.mean(2, keepdim=True)
    bound = k.abs().amax(2, keepdim=True).norm(dim=3, keepdim=True)  # of what a rotation may make of a key
    q, k, v = (x.float() for x in (rotated(q), rotated(k), v.cpu()))
    scales = q.abs().amax(3, keepdim=True) / 448, bound.float() / 448, v.abs().amax((2, 3), keepdim=True) / 448
    return *(x / s.clamp(min=1e-15 / 448) for x, s in zip((q, k, v), scales, strict=True)), *scales


def assert_rounded(ours: Tensor, exact: Tensor) -> None:
    """Check e4m3 numbers up to 448; where the exact one lies halfway, up to float32's rounding, both neighbours do."""
    ours, nearest = ours.float().cpu(), exact.to(E4M3).float()
    assert ((ours - exact).abs() <= (nearest - exact).abs() + 448 * 2**-20).all()


@pytest.mark.parametrize(
    ("q_len", "k_len", "dim", "v_dim", "block_size"),
    [
        (1, 1, 64, 64, 128),
        (63, 200, 40, 64, 128),
        (130, 130, 128, 96, 128),
        (77, 333, 64, 128, 64),
        (70, 190, 256, 64, 128),
        (150, 201, 192, 256, 64),
    ],
)
def test_rounding(q_len: int, k_len: int, dim: int, v_dim: int, block_size: int) -> None:
    from stem_attn.backends.triton.fp8 import quantize

    q, k, v = make_qkv(q_len, k_len, batch=2, heads=4, kv_heads=2, dim=dim, v_dim=v_dim, dtype=torch.float16)
    k = k + 5 * torch.randn(2, 2, 1, dim, generator=torch.Generator().manual_seed(1)).half()
    x = quantize(*(t.to(DEVICE) for t in (q, k, v)), k_len, None, block_size, shifts=True)
    exact_q, exact_k, exact_v, q_scales, k_scales, v_scales = rounded_by_torch(q, k, v)
    first = (k_len - q_len) % block_size  # what the first block of queries lacks
    queries = slice(first, first + q_len)

    torch.testing.assert_close(x.q_scales[:, :, queries, None].cpu(), q_scales)
    torch.testing.assert_close(x.kv_scales[0, :, :, None, None].cpu(), k_scales, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(x.kv_scales[1, :, :, None, None].cpu(), v_scales)
    assert_rounded(x.q[:, :, queries], exact_q)
    if k_len > 1:  # less the mean, only rounding is left of one key
        assert_rounded(x.k[:, :, :k_len], exact_k)
    values = values_of(x.v, 1 << (v_dim - 1).bit_length())
    assert_rounded(values[:, :, :k_len, :v_dim], exact_v)
    for whole, held in ((x.q, queries), (x.k, slice(0, k_len)), (values, slice(0, k_len))):
        rest = whole.float().cpu()
        rest[:, :, held] = 0
        assert not rest.any()
    mean = k.double().mean(2).repeat_interleave(2, 1)
    shifts = torch.einsum("bhtd,bhd->bht", q.double(), mean)
    torch.testing.assert_close(x.shifts[:, :, queries].double().cpu(), shifts, atol=1e-3, rtol=1e-4)
    assert not x.unsafe.any()


@pytest.mark.parametrize(("page_size", "block_size"), [(16, 64), (24, 128), (128, 128)])
def test_rounding_of_pages(page_size: int, block_size: int) -> None:
    """Pages in any order, and garbage past the end."""
    from stem_attn.backends.triton.fp8 import quantize

    q, k, v = (x.to(DEVICE) for x in make_qkv(90, 150, heads=2, kv_heads=1, dim=64, dtype=torch.float16))
    count = -(-150 // page_size)
    pages = torch.randperm(count + 2, generator=torch.Generator().manual_seed(0))[:count].int().to(DEVICE)
    caches = []
    for x in (k, v):
        cache = torch.full((count + 2, 1, page_size, 64), torch.nan, dtype=x.dtype, device=DEVICE)
        padded = F.pad(x[0], (0, 0, 0, count * page_size - 150), value=torch.nan)
        cache[pages.long()] = padded.unflatten(1, (count, page_size)).transpose(0, 1)
        caches.append(cache)
    expected = quantize(q, k, v, 150, None, block_size, shifts=False)
    x = quantize(q, *caches, 150, pages, block_size, shifts=False)
    for name in ("q", "k", "v", "q_scales", "kv_scales", "unsafe"):
        ours, theirs = getattr(x, name), getattr(expected, name)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 6e4])
def test_heads_whose_numbers_reach_too_far(where: str, value: float) -> None:
    from stem_attn.backends.triton.fp8 import quantize

    inputs = dict(zip("qkv", make_qkv(200, batch=2, heads=2, kv_heads=2, dim=64, dtype=torch.float16), strict=True))
    inputs[where][1, 0, 150, 3] = value
    x = quantize(*(t.to(DEVICE) for t in inputs.values()), 200, None, BLOCK, shifts=False)
    assert x.unsafe.tolist() == [[0, 0], [1, 0]]


def test_zeros_are_safe() -> None:
    from stem_attn.backends.triton.fp8 import quantize

    q, k, v = (torch.zeros(1, 1, 150, 64, dtype=torch.float16, device=DEVICE) for _ in range(3))
    x = quantize(q, k, v, 150, None, BLOCK, shifts=False)
    assert not x.unsafe.any()
    assert (x.kv_scales > 0).all()
    assert (x.q_scales > 0).all()
    assert not any(t.float().any() for t in (x.q, x.k, x.v))


def test_precision_is_never_replaced() -> None:
    """What asks for 8 bits by name gets them or an error, whoever chooses the backend."""
    q, k, v = make_qkv(300, heads=2, kv_heads=1, dim=64, dtype=torch.float16)
    config = StemConfig(precision="fp8", score="linear")
    with pytest.raises(ValueError, match=r"no backend can run this call with precision='fp8': .*cpu: it multiplies in"):
        stem_attention(q, k, v, config=config)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: it multiplies in the inputs' precision"):
        stem_attention(q, k, v, config=config, backend="cpu")
    with pytest.raises(ValueError, match="precision must be one of auto, fp8, got 'fp4'"):
        StemConfig(precision="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision='fp8' cannot be combined with residual='mean'"):
        StemConfig(precision="fp8", residual="mean")
    everything = BlockSelection.everything(batch=1, heads=2, grid=BlockGrid(300, 300, 128), device="cpu")
    with pytest.raises(ValueError, match="precision='fp8' cannot be combined with residual='mean'"):
        block_sparse_attention(q, k, v, everything, residual="mean", precision="fp8")
    selection = BlockSelection.everything(batch=1, heads=2, grid=BlockGrid(300, 300, 32), device=DEVICE)
    call = Call(Layout.dense(*(x.to(DEVICE) for x in (q, k, v))), 32, 0.1, precision="fp8")
    assert "its block sizes are 64 and 128, got 32" in str(TritonBackend().why_unsupported(call))
    with pytest.raises(ValueError, match=r"8-bit|block sizes are 64 and 128|inputs' precision"):
        block_sparse_attention(*(x.to(DEVICE) for x in (q, k, v)), selection, precision="fp8")


def test_a_refusal_says_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_attn.backends.triton import fp8

    def said(q: Tensor, k: Tensor, v: Tensor) -> str:
        return str(fp8.why_unsupported(Call(Layout.dense(q, k, v), BLOCK, 0.1, precision="fp8")))

    q, k, v = make_qkv(300, heads=2, kv_heads=1, dim=64, dtype=torch.float16)
    assert "needs a Hopper GPU" in said(q, k, v)
    assert "got cpu and Triton 3" in said(q, k, v)
    monkeypatch.setattr(fp8, "gluon_runs_on", lambda device: True)
    assert said(q, k, v) == "None"
    assert "takes float16 and bfloat16, got torch.float32" in said(q.float(), k.float(), v.float())
    assert "its head dims go from 33 to 256, got 64 and 32" in said(q, k, v[..., :32])


def random_selection(
    q_len: int, k_len: int, *, batch: int = 1, heads: int = 4, block_size: int = BLOCK
) -> BlockSelection:
    """Keep the diagonal blocks and half of the others."""
    gen = torch.Generator().manual_seed(1)
    grid = BlockGrid(q_len, k_len, block_size)
    columns, diagonal = torch.arange(grid.k_blocks), grid.block_ids()[:, None]
    mask = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < 0.5
    mask = (mask & (columns < diagonal)) | (columns == diagonal)
    made = BlockSelection.from_mask(mask, block_size=block_size, q_len=q_len, k_len=k_len)
    return BlockSelection.made(made.indices.to(DEVICE), made.counts.to(DEVICE), grid)


def weights_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel's weights of logits [..., tile], in powers of two, and the largest logits.

    The bits of an e4m3 number are about 8 times its logarithm; the largest weight of a tile is 448.
    """
    peak = logits.amax(-1, keepdim=True).clamp(min=-1e30)
    bits = (8 * (logits - peak) + 126).clamp(min=0).round().to(torch.uint8)
    return bits.view(E4M3).double(), peak


def emulated(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, scale: float, window: int | None
) -> Tensor:
    """Attend in float64 with inputs that were rounded to e4m3, and with the kernel's weights."""
    *numbers, q_scales, k_scales, v_scales = rounded_by_torch(q, k, v)
    scales = q_scales, k_scales, v_scales
    q, k, v = (x.to(E4M3).double() * s for x, s in zip(numbers, scales, strict=True))
    tile = choose_fp8_tile(block_size, q.shape[3], 1 << (v.shape[3] - 1).bit_length()).keys
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    i, j = torch.arange(k.shape[2])[-q.shape[2] :, None], torch.arange(k.shape[2])
    seen = mask[:, :, (i - i[0] // block_size * block_size) // block_size, j // block_size] & (j <= i)
    if window is not None:
        seen &= j > i - window
    logits = (q @ k.transpose(2, 3) * (scale / math.log(2))).masked_fill(~seen, -torch.inf)
    logits = F.pad(logits, (0, -k.shape[2] % tile), value=-torch.inf).unflatten(3, (-1, tile))
    weights, peaks = weights_of(logits)
    weights = (weights * (peaks - peaks.amax(3, keepdim=True)).exp2()).flatten(3)[..., : k.shape[2]]
    return weights @ v / weights.sum(3, keepdim=True)


def check(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = BLOCK, window: int | None = None, softcap=None, sinks=None
) -> None:
    """Compare with float64: little more may be lost than what rounding costs in exact arithmetic."""
    batch, heads, q_len, dim = q.shape
    selection = random_selection(q_len, k.shape[2], batch=batch, heads=heads, block_size=block_size)
    mask, scale = selection.to_mask().cpu(), dim**-0.5
    asked = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    host = q.cpu(), k.cpu(), v.cpu(), mask, block_size
    exact, exact_lse = reference_attention(*host, **asked)
    out, lse = block_sparse_attention(q, k, v, selection, precision="fp8", return_lse=True, **asked)
    error = out.double().cpu() - exact
    plain = reference_attention(*host, scale=scale, window=window)[0]
    allowed = emulated(q, k, v, mask, block_size, scale, window) - plain
    assert error.pow(2).mean().sqrt() <= 1.2 * allowed.pow(2).mean().sqrt()
    assert error.abs().max() <= 2 * allowed.abs().max()
    torch.testing.assert_close(lse.double().cpu(), exact_lse, atol=0.15, rtol=0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before a kernel writes them."""
    make, make_lse = Call.new_output, Call.new_lse
    monkeypatch.setattr(Call, "new_output", lambda call: make(call).fill_(torch.nan))
    monkeypatch.setattr(Call, "new_lse", lambda call: make_lse(call).fill_(torch.nan))


def draw(q_len: int, k_len: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **shape: int):
    """Draw inputs whose keys have a mean."""
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "dim": 128} | shape
    q, k, v = make_qkv(q_len, k_len, dtype=dtype, seed=seed, **shape)
    k = k + 2 * torch.randn(*k.shape[:2], 1, k.shape[3], generator=torch.Generator().manual_seed(9)).to(dtype)
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 63), (129, 129), (200, 333), (1000, 1500)])
def test_odd_lengths_and_prefixes(q_len: int, k_len: int, dtype: torch.dtype, poisoned: None) -> None:
    check(*draw(q_len, k_len, batch=2, dtype=dtype))


@on_hopper
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 63), (64, 64), (65, 65), (200, 333), (1000, 1500)])
def test_odd_lengths_and_prefixes_in_blocks_of_64(q_len: int, k_len: int, dim: int, poisoned: None) -> None:
    check(*draw(q_len, k_len, batch=2, dim=dim), block_size=64)


@on_hopper
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 100), (129, 129), (1000, 1500)])
def test_odd_lengths_and_prefixes_in_tiles_of_half_a_block(q_len: int, k_len: int, poisoned: None) -> None:
    check(*draw(q_len, k_len, batch=2, dim=256))


@on_hopper
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize(
    ("dim", "v_dim"), [(64, 64), (80, 128), (128, 64), (96, 96), (40, 72), (192, 128), (64, 256), (256, 200)]
)
def test_head_dims(dim: int, v_dim: int, block_size: int, poisoned: None) -> None:
    check(*draw(150, 270, dim=dim, v_dim=v_dim), block_size=block_size)


@on_hopper
@pytest.mark.parametrize(("dim", "block_size"), SHAPES)
@pytest.mark.parametrize("window", [1, 50, 300])
def test_sliding_window(window: int, dim: int, block_size: int, poisoned: None) -> None:
    check(*draw(150, 400, dim=dim), block_size=block_size, window=window)


@on_hopper
@pytest.mark.parametrize(("dim", "block_size"), SHAPES)
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, True), (5.0, False), (5.0, True)])
def test_softcap_and_sinks(softcap: float | None, with_sinks: bool, dim: int, block_size: int, poisoned: None) -> None:
    sinks = torch.tensor([-1.0, 2.0, 20.0, -torch.inf], device=DEVICE) if with_sinks else None
    check(*draw(150, 270, dim=dim), block_size=block_size, softcap=softcap, sinks=sinks)


@on_hopper
@pytest.mark.parametrize(("dim", "block_size"), SHAPES)
def test_a_long_row_of_equal_signs(dim: int, block_size: int) -> None:
    """Sums that only grow: the tensor core keeps 14 bits of them, so a long sum must not be left to it."""
    tokens = 32768
    q, k, v = draw(tokens, tokens, heads=1, kv_heads=1, dim=dim)
    q, v = q / 32, (1 + v.abs() / 4) * torch.linspace(0.5, 1, dim, device=DEVICE, dtype=v.dtype)  # outputs round apart
    selection = BlockSelection.everything(batch=1, heads=1, grid=BlockGrid(tokens, tokens, block_size), device=DEVICE)
    out = block_sparse_attention(q, k, v, selection, precision="fp8")[0, 0, -BLOCK:].double()
    *numbers, q_scales, k_scales, v_scales = rounded_by_torch(q[:, :, -BLOCK:], k, v)
    scales = q_scales, k_scales, v_scales
    q, k, v = (x.to(E4M3).double() * s for x, s in zip(numbers, scales, strict=True))
    i = torch.arange(tokens)
    logits = (q @ k.transpose(2, 3) * dim**-0.5).masked_fill(i > i[-BLOCK:, None], -torch.inf)
    exact = (logits.softmax(3) @ v)[0, 0]
    bias = ((out.cpu() - exact) / exact).mean()
    assert bias.abs() < 2**-11, bias  # an eighth of what a bfloat16 can tell apart


@on_hopper
@pytest.mark.parametrize(("dim", "block_size"), SHAPES)
@pytest.mark.parametrize("where", ["k", "v"])
def test_unsafe_heads_are_computed_as_without(where: str, dim: int, block_size: int, poisoned: None) -> None:
    """Bit for bit, whichever kernel that is; and no other head is touched."""
    inputs = dict(zip("qkv", draw(700, 900, batch=2, dim=dim), strict=True))
    selection = random_selection(700, 900, batch=2, block_size=block_size)
    before = block_sparse_attention(*inputs.values(), selection, precision="fp8")
    reason = "triton: heads whose numbers 8 bits do not hold are computed in the inputs' precision"
    counted = fallbacks().get(reason, 0)
    for value in (torch.nan, torch.inf, 1e20):
        inputs[where][1, 0, 500, 3] = value
        out, lse = block_sparse_attention(*inputs.values(), selection, precision="fp8", return_lse=True)
        plain, plain_lse = block_sparse_attention(*inputs.values(), selection, return_lse=True)
        assert torch.equal(out[1, :2].view(torch.int16), plain[1, :2].view(torch.int16))
        assert torch.equal(lse[1, :2].view(torch.int32), plain_lse[1, :2].view(torch.int32))
        assert torch.equal(out[0], before[0])
        assert torch.equal(out[1, 2:], before[1, 2:])
    assert fallbacks()[reason] == counted + 3


@on_hopper
@pytest.mark.parametrize("value", [torch.nan, 1e20])
def test_one_query_reaches_its_own_row(value: float) -> None:
    q, k, v = draw(700, 700)
    selection = random_selection(700, 700)
    before = block_sparse_attention(q, k, v, selection, precision="fp8")
    q[0, 1, 300, 5] = value
    out = block_sparse_attention(q, k, v, selection, precision="fp8")
    others = torch.ones(700, dtype=torch.bool, device=DEVICE)
    others[300] = False
    assert torch.equal(out[:, :, others], before[:, :, others])


@on_hopper
@pytest.mark.parametrize("page", [16, 24])
@pytest.mark.parametrize(("dim", "block_size"), SHAPES)
def test_packed_and_paged_equal_dense(dim: int, block_size: int, page: int) -> None:
    config = StemConfig(precision="fp8", budget_ratio=0.3, budget_bias=1, block_size=block_size)
    lengths = [700, 1300]
    parts = [draw(n, n, seed=n, dim=dim) for n in lengths]
    dense = [stem_attention(*x, config=config)[0].transpose(0, 1) for x in parts]
    packed = [torch.cat([x[i][0].transpose(0, 1) for x in parts]) for i in range(3)]
    starts = [0, 700, 2000]
    out = stem_attention_varlen(*packed, cu_seqlens_q=starts, config=config)
    assert torch.equal(out, torch.cat(dense))
    table, caches = torch.arange(200, dtype=torch.int32, device=DEVICE).view(2, 100), []
    for x in packed[1:]:
        cache = torch.zeros(200, page, *x.shape[1:], dtype=x.dtype, device=DEVICE)
        for n, (start, length) in enumerate(((0, 700), (700, 1300))):
            cache.flatten(0, 1)[n * 100 * page : n * 100 * page + length] = x[start : start + length]
        caches.append(cache)
    how = {"cu_seqlens_q": starts, "seq_lens": lengths, "block_table": table}
    out = stem_attention_paged(packed[0], *caches, config=config, **how)
    assert torch.equal(out, torch.cat(dense))


@on_hopper
def test_nothing_waits_for_the_device() -> None:
    q, k, v = draw(700, 700)
    selection = random_selection(700, 700)
    block_sparse_attention(q, k, v, selection, precision="fp8")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attention(q, k, v, selection, precision="fp8")
    finally:
        torch.cuda.set_sync_debug_mode("default")
