"""The Triton attention kernels against float64: on a GPU, or in Triton's CPU interpreter where there is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import make_qkv
from stem_attn import BlockSelection, StemConfig, stem_attention_varlen
from stem_attn.backends.triton import TritonBackend
from stem_attn.blocks import BlockGrid
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention

GPU = torch.cuda.is_available()
pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's

DEVICE = "cuda" if GPU else "cpu"
# The interpreter has no bfloat16 products, and is slow: fewer and smaller cases go there.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
BACKEND = TritonBackend()


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before a kernel writes them."""
    make = Call.new_output
    monkeypatch.setattr(Call, "new_output", lambda call: make(call).fill_(torch.nan))


@pytest.fixture(params=["fastest", "portable"] if GPU else ["portable"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the kernel that the device gets, and with the portable one."""
    from stem_attn.backends.triton import attention

    if request.param == "portable":
        monkeypatch.setattr(attention, "hopper_fits", lambda *_: False)


def random_selection(
    q_len: int, k_len: int, size: int, *, batch: int = 1, heads: int = 4, seed: int = 1
) -> BlockSelection:
    """Keep the diagonal blocks and a random share of the others, another share in each head and batch row."""
    gen = torch.Generator().manual_seed(seed)
    grid = BlockGrid(q_len, k_len, size)
    columns = torch.arange(grid.k_blocks)
    diagonal = grid.block_ids()[:, None]
    share = torch.rand(batch, heads, 1, 1, generator=gen)
    mask = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < share
    mask = (mask & (columns < diagonal)) | (columns == diagonal)
    made = BlockSelection.from_mask(mask, block_size=size, q_len=q_len, k_len=k_len)
    # The kernels read nothing past a row's count.
    indices = F.pad(made.indices, (0, 2), value=-1)
    indices = indices.where(indices >= 0, 1 << 30)
    return BlockSelection.made(indices.to(DEVICE), made.counts.to(DEVICE), grid)


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in tensors)


def mask_of(selection: BlockSelection) -> Tensor:
    columns = torch.arange(selection.indices.shape[-1])
    valid = columns < selection.counts.cpu()[..., None]
    trimmed = selection.indices.cpu().where(valid, -1)
    return BlockSelection(
        trimmed, selection.counts.cpu(), selection.block_size, selection.q_len, selection.k_len
    ).to_mask()


def attend(q: Tensor, k: Tensor, v: Tensor, *, selection: BlockSelection) -> Tensor:
    call = Call(Layout.dense(q, k, v), selection.block_size, 0.125)
    out = call.new_output()
    BACKEND.attend(call, [selection], out, None)
    return out


def check(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float | None = None, window: int | None = None
) -> None:
    """Compare with float64: at most twice the max and RMS error of dense SDPA in the same dtype."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    call = Call(Layout.dense(q, k, v), selection.block_size, scale, window)
    assert BACKEND.why_unsupported(call) is None
    out, lse = call.new_output(), call.new_lse()
    BACKEND.attend(call, [selection], out, lse)
    mask = mask_of(selection)
    exact, exact_lse = reference_attention(
        q.cpu(), k.cpu(), v.cpu(), mask, selection.block_size, scale=scale, window=window
    )
    i = torch.arange(selection.q_len)[:, None] + selection.grid.offset
    j = torch.arange(selection.k_len)
    row = i // selection.block_size - selection.grid.first_block
    seen = mask[:, :, row, j // selection.block_size] & (j <= i) & (j > i - (window or selection.k_len))
    group = q.shape[1] // k.shape[1]
    repeated = (x.repeat_interleave(group, 1) for x in (k, v))
    dense = F.scaled_dot_product_attention(q, *repeated, attn_mask=seen.to(q.device), scale=scale)
    error, dense_error = out.double().cpu() - exact, dense.double().cpu() - exact
    assert out.dtype == q.dtype
    assert error.abs().max() <= 2 * dense_error.abs().max() + 1e-6
    assert error.pow(2).mean().sqrt() <= 2 * dense_error.pow(2).mean().sqrt() + 1e-7
    torch.testing.assert_close(lse.double().cpu(), exact_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 63), (63, 63), (111, 200), (129, 129), (200, 333)])
def test_odd_lengths_and_prefixes(q_len: int, k_len: int, dtype: torch.dtype) -> None:
    batch, heads = (2, 4) if GPU else (1, 2)
    q, k, v = on_device(*make_qkv(q_len, k_len, batch=batch, heads=heads, kv_heads=heads // 2, dim=64, dtype=dtype))
    for size in (64, 128):
        check(q, k, v, random_selection(q_len, k_len, size, batch=batch, heads=heads))
    if GPU:  # on Hopper with its own kernel
        q, k, v = on_device(*make_qkv(q_len, k_len, batch=2, heads=4, kv_heads=2, dim=128, dtype=dtype))
        check(q, k, v, random_selection(q_len, k_len, 64, batch=2, heads=4))


@pytest.mark.skipif(GPU, reason="a GPU that has descriptors uses them in the other tests")
@pytest.mark.parametrize("window", [None, 40])
def test_descriptors_in_the_interpreter(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_attn.backends.triton import attention_launches

    monkeypatch.setattr(attention_launches, "has_copy_engine", lambda _: True)
    q, k, v = make_qkv(111, 200, batch=2, heads=2, kv_heads=1, dim=80, v_dim=64, dtype=torch.float16)
    check(q, k, v, random_selection(111, 200, 64, batch=2, heads=2), window=window)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256] if GPU else [80, 256])
def test_head_dims(dim: int) -> None:
    for dtype in DTYPES:
        q, k, v = on_device(*make_qkv(150, 190, heads=2, kv_heads=1, dim=dim, dtype=dtype))
        check(q, k, v, random_selection(150, 190, 128, heads=2))


def test_v_has_its_own_head_dim() -> None:
    for dim, v_dim in ((64, 128), (96, 48), (192, 128), *([(128, 256)] if GPU else [])):
        q, k, v = on_device(*make_qkv(140, heads=2, kv_heads=1, dim=dim, v_dim=v_dim, dtype=torch.float16))
        check(q, k, v, random_selection(140, 140, 128, heads=2))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_block_sizes(size: int) -> None:
    q, k, v = on_device(*make_qkv(70, 240, heads=2, kv_heads=1, dim=64, dtype=torch.float16))
    check(q, k, v, random_selection(70, 240, size, heads=2))


def test_float32() -> None:
    q, k, v = on_device(*make_qkv(70, 200, heads=2, kv_heads=1, dim=64))
    check(q, k, v, random_selection(70, 200, 64, heads=2))


@pytest.mark.parametrize("window", [1, 50, 128, 1000])
def test_sliding_window(window: int) -> None:
    """Inside edge blocks too, and where a kept block lies wholly outside of it."""
    for size, dim in ((64, 64), (64, 128), (128, 64), (128, 256)) if GPU else ((64, 64),):
        q, k, v = on_device(*make_qkv(150, 270, heads=2, kv_heads=1, dim=dim, dtype=torch.float16))
        check(q, k, v, random_selection(150, 270, size, heads=2), window=window)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scale_of_any_sign(scale: float) -> None:
    q, k, v = on_device(*make_qkv(140, heads=2, kv_heads=1, dim=64, dtype=torch.float16))
    check(q, k, v, random_selection(140, 140, 128, heads=2), scale=scale)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = on_device(*make_qkv(260, heads=1, kv_heads=1, dim=64, dtype=torch.float16))
    check(q * 30, k * 30, v, random_selection(260, 260, 128, heads=1))


@pytest.mark.parametrize("size", [64, 128] if GPU else [64])
def test_strides(size: int) -> None:
    """Token-major, sliced, expanded, misaligned and reversed-dimension inputs; only the last needs a copy."""
    q, k, v = on_device(*make_qkv(100, batch=2, heads=2, kv_heads=1, dim=64, dtype=torch.float16))
    selection = random_selection(100, 100, size, batch=2, heads=2)
    expected = attend(q, k, v, selection=selection)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2)
    parts = fused.split([128, 64, 64], 2)
    sliced = [x.unflatten(2, (-1, 64)).transpose(1, 2) for x in parts]
    misaligned = [F.pad(x, (3, 2))[..., 3:-2] for x in (q, k, v)]
    transposed = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for inputs in (token_major, sliced, misaligned, transposed):
        out = attend(*inputs, selection=selection)
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    one = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    rows = []
    for b in range(2):
        part = BlockSelection.made(selection.indices[b : b + 1], selection.counts[b : b + 1], selection.grid)
        rows.append(attend(*(x[:1] for x in (q, k, v)), selection=part))
    out = attend(*one, selection=selection)
    torch.testing.assert_close(out, torch.cat(rows), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [64, 128] if GPU else [64])
def test_offsets_beyond_32_bits(size: int) -> None:
    """Heads that lie more than 2^31 numbers apart (the memory between them is never touched)."""
    small = on_device(*make_qkv(130, heads=2, kv_heads=2, dim=64, dtype=torch.float16))
    selection = random_selection(130, 130, size, heads=2)
    apart = (1 << 31) + 64
    far = []
    for x in small:
        base = torch.empty(apart + 130 * 64, dtype=x.dtype, device=x.device)
        far.append(base.as_strided(x.shape, (0, apart, 64, 1)).copy_(x))
    out = attend(*far, selection=selection)
    expected = attend(*small, selection=selection)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


def test_many_blocks() -> None:
    """Long enough that the kernels' rings of tiles go round several times."""
    tokens = 4000 if GPU else 600
    for size, dim in ((128, 64), (128, 256), (64, 128)) if GPU else ((128, 64),):
        q, k, v = on_device(*make_qkv(tokens, heads=2, kv_heads=1, dim=dim, dtype=torch.float16))
        check(q, k, v, random_selection(tokens, tokens, size, heads=2))


def test_maxima_that_rise_late() -> None:
    """The maximum of a row lags behind its logits; here they rise from block to block, or go up and down."""
    tokens = 1500 if GPU else 400
    for size in (64, 128):
        for dtype in DTYPES:
            q, k, v = on_device(*make_qkv(tokens, heads=2, kv_heads=1, dim=128, dtype=dtype))
            for weights in (torch.linspace(20, 0.1, tokens), 10 + 9 * torch.linspace(0, 9, tokens).sin()):
                steep = (k * weights.to(k.device)[:, None]).to(dtype)
                check(q, steep, v, random_selection(tokens, tokens, size, heads=2))


@pytest.mark.parametrize(("size", "long_rows"), [(32, 96), (128, 96), (128, 0)] if GPU else [(64, 96)])
def test_packed_sequences_stay_apart(size: int, long_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed sequences give what each alone gives, even beside a sequence of NaN."""
    from stem_attn.backends.triton import attention

    monkeypatch.setattr(attention, "LONG_ROWS", long_rows)
    lengths = [(70, 200), (1, 130), (129, 129)]
    drawn = [
        make_qkv(*pair, heads=2, kv_heads=1, dim=64, dtype=torch.float16, seed=i) for i, pair in enumerate(lengths)
    ]
    for x in drawn[1]:
        x.fill_(torch.nan)
    drawn = [on_device(*x) for x in drawn]
    selections = [random_selection(*pair, size, heads=2, seed=i) for i, pair in enumerate(lengths)]
    packed = (torch.cat([x[n][0] for x in drawn], 1).transpose(0, 1).contiguous() for n in range(3))
    starts = ([0, *torch.tensor([pair[n] for pair in lengths]).cumsum(0).tolist()] for n in range(2))
    call = Call(Layout.packed(*packed, *starts), size, 0.125)
    whole = call.new_output()
    BACKEND.attend(call, selections, whole, None)
    out = whole[0].transpose(0, 1)
    for n in (0, 2):
        alone = Call(Layout.dense(*drawn[n]), size, 0.125)
        expected = alone.new_output()
        BACKEND.attend(alone, [selections[n]], expected, None)
        start = sum(pair[0] for pair in lengths[:n])
        part = out[start : start + lengths[n][0]]
        torch.testing.assert_close(part.transpose(0, 1)[None], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [32, 128] if GPU else [32])
def test_packed_sequences_of_the_public_call(size: int) -> None:
    """Same blocks and the same numbers as on the CPU; one sequence is sparse, one has a prefix, one a single query."""
    config = StemConfig(block_size=size, budget_ratio=0.2, budget_bias=1)
    lengths = [(10 * size, 10 * size), (20, 3 * size + 5), (1, 1)]
    parts = [make_qkv(*pair, heads=2, kv_heads=1, dim=64, v_dim=32, seed=i) for i, pair in enumerate(lengths)]
    packed = [torch.cat([x[n][0].transpose(0, 1) for x in parts]) for n in range(3)]
    cu_q, cu_k = ([0, *torch.tensor([pair[n] for pair in lengths]).cumsum(0).tolist()] for n in (0, 1))
    arguments = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "config": config, "prompt_len": [12 * size, 5 * size, 1]}
    expected = stem_attention_varlen(*packed, **arguments, backend="cpu")
    out = stem_attention_varlen(*on_device(*packed), **arguments, backend="triton")
    assert out.shape == expected.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-4)


def test_refusals_say_what_was_expected() -> None:
    def why(dtype: torch.dtype = torch.float16, dim: int = 64, size: int = 64) -> str | None:
        q, k, v = on_device(*make_qkv(64, dim=dim, dtype=dtype))
        return BACKEND.why_unsupported(Call(Layout.dense(q, k, v), size, 0.125))

    assert why() is None
    assert "48" in why(size=48)
    assert "320" in why(dim=320)
    assert "float64" in why(dtype=torch.float64)


def test_everything_needs_no_indices() -> None:
    q, k, v = on_device(*make_qkv(111, 200, batch=2, heads=2, kv_heads=1, dim=64, dtype=torch.float16))
    everything = BlockSelection.everything(batch=2, heads=2, grid=BlockGrid(111, 200, 64), device=DEVICE)
    out = attend(q, k, v, selection=everything)
    assert everything._indices is None
    assert torch.equal(
        out, attend(q, k, v, selection=BlockSelection(everything.indices, everything.counts, 64, 111, 200))
    )


@pytest.mark.parametrize(("size", "packed"), [(128, False), (64, True)])
@pytest.mark.parametrize("asked", [{}, {"window": 20}, {"softcap": 1.5}, {"scale": -0.2}])
def test_all_blocks_if_a_flag_on_the_device_says_so(size: int, packed: bool, asked: dict[str, float]) -> None:
    """And otherwise not one number is written, though nobody on the host knows."""
    batch, dim = (1, 64) if packed or not GPU else (2, 128)
    q, k, v = on_device(*make_qkv(150, 270, batch=batch, heads=2, kv_heads=1, dim=dim, v_dim=dim, dtype=DTYPES[-1]))
    layout = Layout.dense(q, k, v)
    if packed:
        layout = Layout.packed(*(x[0].transpose(0, 1) for x in (q, k, v)), [0, 41, 150], [0, 99, 270])
    call = Call(layout, size, **{"scale": 0.125, **asked})
    expected, given = call.new_output(), torch.full((batch, 150, 2, dim), 7.0, dtype=q.dtype, device=DEVICE)
    out = given.transpose(1, 2)
    for wanted in (False, True):
        BACKEND.attend_if(call, torch.tensor(wanted, device=DEVICE), out)
        if not wanted:
            assert (out == 7).all()
    everything = [
        BlockSelection.everything(batch=batch, heads=2, grid=call.grid(part), device=DEVICE) for part in call.parts
    ]
    BACKEND.attend(call, everything, expected, None)
    assert torch.equal(out, expected)
