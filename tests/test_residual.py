"""`residual="mean"`: pruned blocks return through their means. Every backend against float64."""

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import SMALL, make_qkv
from stem_attn import (
    BlockSelection,
    StemConfig,
    backends,
    block_sparse_attention,
    stem_attention,
    stem_attention_paged,
    stem_attention_varlen,
)
from stem_attn.blocks import BlockGrid
from stem_attn.call import Call
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention, reference_stem

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's
MEAN = dataclasses.replace(SMALL, residual="mean")
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter has no bfloat16 products


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def on_device(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to("cuda" if GPU and backend == "triton" else "cpu") for x in tensors]


def random_mask(q_len: int, k_len: int, size: int, *, batch: int = 1, heads: int = 2, share: float = 0.4) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    grid = BlockGrid(q_len, k_len, size)
    columns, diagonal = torch.arange(grid.k_blocks), grid.block_ids()[:, None]
    drawn = torch.rand(batch, heads, grid.q_blocks, grid.k_blocks, generator=gen) < share
    return (drawn & (columns < diagonal)) | (columns == diagonal)


def selection_of(mask: Tensor, q: Tensor, k: Tensor, size: int) -> BlockSelection:
    made = BlockSelection.from_mask(mask, block_size=size, q_len=q.shape[2], k_len=k.shape[2])
    # Nothing is read past a row's count.
    indices = F.pad(made.indices, (0, 2), value=-1)
    indices = indices.where(indices >= 0, 1 << 30)
    return BlockSelection.made(indices.to(q.device), made.counts.to(q.device), made.grid)


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: int, scale: float | None = None) -> None:
    """At most twice the error that dense SDPA makes in the same dtype on the same inputs."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = on_device(backend, q, k, v)
    chosen = selection_of(mask, q, k, size)
    out, lse = block_sparse_attention(q, k, v, chosen, scale=scale, residual="mean", return_lse=True, backend=backend)
    exact, exact_lse = reference_attention(q.cpu(), k.cpu(), v.cpu(), mask, size, scale=scale, residual="mean")
    everything = torch.ones_like(mask)
    dense_exact, _ = reference_attention(q.cpu(), k.cpu(), v.cpu(), everything, size, scale=scale)
    group = q.shape[1] // k.shape[1]
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    repeated = (x.repeat_interleave(group, 1) for x in (k, v))
    dense = F.scaled_dot_product_attention(q, *repeated, attn_mask=causal, scale=scale)
    error, lost = out.double().cpu() - exact, dense.double().cpu() - dense_exact
    floor = 4e-7  # a handful of tokens may come out exact by chance
    stored = 0.0
    if backend == "triton":  # what the kept blocks gave is stored in q's dtype between two launches
        kept, _ = reference_attention(q.cpu(), k.cpu(), v.cpu(), mask, size, scale=scale)
        stored = float(kept.abs().max()) * torch.finfo(q.dtype).eps / 2
    assert out.dtype == q.dtype
    # Rounding grows with what is rounded, and the outputs differ in size.
    size_ratio = float(exact.abs().max() / dense_exact.abs().max()), float(exact.norm() / dense_exact.norm())
    assert error.abs().max() <= 2 * lost.abs().max() * size_ratio[0] + stored + floor
    assert error.square().mean().sqrt() <= 2 * lost.square().mean().sqrt() * size_ratio[1] + floor / 4
    torch.testing.assert_close(lse.double().cpu(), exact_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (63, 63), (1, 129), (111, 111), (75, 210), (100, 256)])
def test_matches_float64(backend: str, q_len: int, k_len: int, dtype: torch.dtype) -> None:
    """Odd lengths, prefixes that end inside a block, tails; heads in groups, and v with its own dim."""
    q, k, v = make_qkv(q_len, k_len, heads=2, kv_heads=1, dim=40, v_dim=24, dtype=dtype)
    check(backend, q, k, v, random_mask(q_len, k_len, 32), 32)


def test_batches_block_sizes_and_strides(backend: str) -> None:
    q, k, v = make_qkv(20, 100, batch=2, heads=2, kv_heads=1, dim=32)
    check(backend, q, k, v, random_mask(20, 100, 64, batch=2), 64)
    mask = random_mask(20, 100, 32, batch=2)
    check(backend, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), mask, 32)
    check(backend, *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)), mask, 32)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scale_of_any_sign(backend: str, scale: float) -> None:
    q, k, v = make_qkv(130, heads=2, kv_heads=1)
    check(backend, q, k, v, random_mask(130, 130, 32), 32, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_torch_rounds_means_to_the_inputs_dtype(dtype: torch.dtype) -> None:
    """It widens its inputs, not their means: those of large, like keys show it in the log-sum-exp."""
    gen = torch.Generator().manual_seed(2)
    q, k, v = make_qkv(260, heads=2, kv_heads=1, dim=64)
    centres = torch.randn(1, 1, 9, 64, generator=gen).repeat_interleave(32, 2)[:, :, :260]
    q, k, v = (x.to(dtype) for x in (q * 3, centres + 0.3 * k, v))
    mask = random_mask(260, 260, 32, share=0.2)
    check("cpu", q, k, v, mask, 32)
    chosen = selection_of(mask, q, k, 32)
    _, lse = block_sparse_attention(q, k, v, chosen, residual="mean", return_lse=True, backend="cpu")
    _, exact = reference_attention(q, k, v, mask, 32, scale=64**-0.5, residual="mean")
    torch.testing.assert_close(lse.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", [3.0, 1e-3])
def test_means_that_decide(backend: str, magnitude: float) -> None:
    """Blocks whose tokens lie close together weigh as much through their means as kept ones: rounding would show."""
    gen = torch.Generator().manual_seed(2)
    q, k, v = make_qkv(260, heads=2, kv_heads=1, dim=64)
    centres = torch.randn(1, 1, 9, 64, generator=gen).repeat_interleave(32, 2)[:, :, :260]
    q, k, v = (x.to(HALF) for x in (q * magnitude, centres + 0.3 * k, centres.flip(3) + v))
    mask = random_mask(260, 260, 32, share=0.2)
    check(backend, q, k, v, mask, 32)
    if GPU and backend == "triton":
        check(
            backend, *(x.bfloat16() * 1e6 if n == 0 else x.bfloat16() * 1e-6 for n, x in enumerate((q, k, v))), mask, 32
        )


def test_descriptors_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if GPU:
        pytest.skip("a GPU that has descriptors uses them in the other tests")
    from stem_attn.backends.triton import attention_launches, residual

    for module in (attention_launches, residual):
        monkeypatch.setattr(module, "has_copy_engine", lambda _: True)
    q, k, v = make_qkv(70, 200, heads=2, kv_heads=1, dim=40, v_dim=24, dtype=torch.float16)
    check("triton", q, k, v, random_mask(70, 200, 64), 64)


def test_devices_have_launches_of_their_own() -> None:
    """A launch keeps its compiled kernel, which is loaded on one device."""
    pytest.importorskip("triton")
    from stem_attn.backends.triton.layouts import alignment_of, layouts_of
    from stem_attn.backends.triton.residual import _means_launches

    q, k, v = make_qkv(128, dtype=torch.float16)
    chosen = selection_of(random_mask(128, 128, 64, heads=q.shape[1]), q, k, 64)
    tensors = q, k, v, chosen.indices, chosen.counts
    rest = chosen.grid, 0
    first, second, again = (
        _means_launches(layouts_of(*tensors), alignment_of(*tensors), q.dtype, torch.device("cuda", index), *rest)
        for index in (0, 1, 0)
    )
    assert first is again
    assert first is not second


HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
in_the_hopper_kernel = pytest.mark.skipif(not HOPPER, reason="the Hopper kernel has no interpreter")


def forbid_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from stem_attn.backends.triton import residual

    monkeypatch.setattr(residual, "merge_means", None)


def test_a_kernel_ruled_out_is_ruled_out_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the module first loaded meanwhile: a test that came first would decide for all that follow."""
    pytest.importorskip("triton")
    from stem_attn.backends import triton
    from stem_attn.backends.triton import attention, residual

    monkeypatch.delitem(sys.modules, residual.__name__)
    monkeypatch.delattr(triton, "residual")
    inputs, mask, asked = make_qkv(70, heads=2, kv_heads=1, dim=32, dtype=torch.float16), random_mask(70, 70, 32), []
    with monkeypatch.context() as patch:
        patch.setattr(attention, "hopper_fits", lambda *_: asked.append(None))
        check("triton", *inputs, mask, 32)
    times = len(asked)
    check("triton", *inputs, mask, 32)
    assert len(asked) == times > 0


@in_the_hopper_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "dim", "v_dim"), [(64, 128, 128), (128, 128, 128), (128, 64, 128), (128, 96, 64)])
def test_in_one_launch(size: int, dim: int, v_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd lengths, prefixes that end inside a block, up to three tiles of means, batches, groups."""
    forbid_the_merge(monkeypatch)
    for q_len, k_len in ((1, 1), (1, 129), (111, 111), (100, 777), (1000, 1333), (200, size * 129 + 5)):
        q, k, v = make_qkv(q_len, k_len, batch=2, heads=4, kv_heads=2, dim=dim, v_dim=v_dim, dtype=dtype)
        for share in (0.0, 0.3):
            check("triton", q, k, v, random_mask(q_len, k_len, size, batch=2, heads=4, share=share), size)


@in_the_hopper_kernel
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("magnitude", [3.0, 1e-3])
def test_means_that_decide_in_one_launch(size: int, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_the_merge(monkeypatch)
    gen = torch.Generator().manual_seed(2)
    q, k, v = make_qkv(1300, heads=2, kv_heads=1, dim=128)
    centres = torch.randn(1, 1, 21, 128, generator=gen).repeat_interleave(64, 2)[:, :, :1300]
    q, k, v = (x.bfloat16() for x in (q * magnitude, centres + 0.3 * k, centres.flip(3) + v))
    check("triton", q, k, v, random_mask(1300, 1300, size, share=0.2), size)


@in_the_hopper_kernel
@pytest.mark.parametrize("size", [64, 128])
def test_nothing_pruned_is_the_same_to_the_bit_in_one_launch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_the_merge(monkeypatch)
    q, k, v = (x.cuda() for x in make_qkv(1000, 1333, heads=2, kv_heads=1, dim=128, dtype=torch.bfloat16))
    mask = random_mask(1000, 1333, size, share=1.0)
    mask[:, 1, 4:, 0] = False
    chosen = selection_of(mask, q, k, size)
    out, lse = block_sparse_attention(q, k, v, chosen, return_lse=True, backend="triton")
    fused, fused_lse = block_sparse_attention(q, k, v, chosen, residual="mean", return_lse=True, backend="triton")
    whole_rows = 4 * size - (1333 - 1000) % size
    for same in ((0, 0), (0, 1, slice(0, whole_rows))):
        assert torch.equal(out[same], fused[same])
        assert torch.equal(lse[same], fused_lse[same])
    assert not torch.equal(out[0, 1, whole_rows:], fused[0, 1, whole_rows:])
    again = block_sparse_attention(q, k, v, chosen, residual="mean", backend="triton")
    assert torch.equal(again, fused)


@in_the_hopper_kernel
@pytest.mark.parametrize("page", [16, 128, 256])
@pytest.mark.parametrize("size", [64, 128])
def test_pages_in_one_launch(page: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the last page is poison."""
    forbid_the_merge(monkeypatch)
    q_len, k_len = 1100, 9001
    q, k, v = (x.cuda() for x in make_qkv(q_len, k_len, heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16))
    config = StemConfig(block_size=size, tail_blocks=0, residual="mean", budget_scope="head")
    alone = stem_attention(q, k, v, config=config, backend="triton")
    pages = -(-k_len // page)
    table = torch.randperm(pages, device="cuda").int()
    caches = []
    for x in (k, v):
        cache = torch.full((pages * page, 2, 128), torch.nan, dtype=x.dtype, device="cuda")
        cache[:k_len] = x[0].transpose(0, 1)
        caches.append(torch.empty_like(cache).view(pages, page, 2, 128))
        caches[-1][table.long()] = cache.view(pages, page, 2, 128)
    lengths = {"cu_seqlens_q": [0, q_len], "seq_lens": [k_len], "block_table": table[None]}
    paged = stem_attention_paged(q[0].transpose(0, 1).contiguous(), *caches, **lengths, config=config, backend="triton")
    assert torch.equal(paged, alone[0].transpose(0, 1))


def test_only_the_diagonal_is_kept(backend: str) -> None:
    q, k, v = make_qkv(75, 210, heads=2, kv_heads=1)
    check(backend, q, k, v, random_mask(75, 210, 16, share=0.0), 16)


def test_nothing_pruned_is_the_same_to_the_bit(backend: str) -> None:
    # A CPU with matrix units rounds bfloat16 weights for them; the means are always added in float32.
    dtype = HALF if backend == "triton" else torch.float32
    q, k, v = on_device(backend, *make_qkv(100, 170, heads=2, kv_heads=1, dtype=dtype))
    mask = random_mask(100, 170, 32, share=1.0)
    mask[:, 1, 2:, 0] = False  # the last rows of a head prune; the first ones and the other head do not
    chosen = selection_of(mask, q, k, 32)
    out, lse = block_sparse_attention(q, k, v, chosen, return_lse=True, backend=backend)
    merged, merged_lse = block_sparse_attention(q, k, v, chosen, residual="mean", return_lse=True, backend=backend)
    whole_rows = 2 * 32 - (170 - 100) % 32
    for same in ((0, 0), (0, 1, slice(0, whole_rows))):
        assert torch.equal(out[same], merged[same])
        assert torch.equal(lse[same], merged_lse[same])
    assert not torch.equal(out[0, 1, whole_rows:], merged[0, 1, whole_rows:])


def test_many_tiles_of_means() -> None:
    """More blocks than a tile holds, and more rows than the plain torch path takes at once."""
    pytest.importorskip("triton")
    q, k, v = make_qkv(20, 16 * 70 + 5, heads=2, kv_heads=1, dtype=torch.float32)
    mask = random_mask(20, 16 * 70 + 5, 16, share=0.1)
    check("triton", q, k, v, mask, 16)


@pytest.mark.parametrize("tile_logits", [1, 20000])
def test_rows_by_tiles_in_plain_torch(tile_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_attn import residual

    monkeypatch.setattr(residual, "_TILE_LOGITS", tile_logits)
    q, k, v = make_qkv(333, 400, batch=2)
    check("cpu", q, k, v, random_mask(333, 400, 16, batch=2, heads=4), 16)


def test_a_mean_is_what_a_block_of_equal_tokens_gives(backend: str) -> None:
    """Where the tokens of a block are alike, nothing is lost: sparse attention with means is dense attention."""
    q, k, v = make_qkv(160, heads=2, kv_heads=1)
    k, v = (x[:, :, ::16].repeat_interleave(16, 2) for x in (k, v))
    q, k, v = on_device(backend, q, k, v)
    chosen = selection_of(random_mask(160, 160, 16, share=0.3), q, k, 16)
    out = block_sparse_attention(q, k, v, chosen, residual="mean", backend=backend)
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *repeated, is_causal=True), atol=5e-6, rtol=1e-4)


def test_the_field_of_the_config() -> None:
    q, k, v = make_qkv(300)
    out, selection = stem_attention(q, k, v, config=MEAN, return_selection=True)
    exact, mask = reference_stem(q, k, v, MEAN, scale=32**-0.5)
    assert torch.equal(selection.to_mask(), mask)
    torch.testing.assert_close(out, exact.float(), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(out, stem_attention(q, k, v, config=SMALL), atol=1e-3)


def test_packed_and_paged_sequences_as_if_alone(backend: str) -> None:
    q_lens, k_lens, page = [20, 1], [80, 70], 16
    parts = [
        on_device(backend, *make_qkv(*n, heads=2, kv_heads=1, seed=i))
        for i, n in enumerate(zip(q_lens, k_lens, strict=True))
    ]
    config = StemConfig(block_size=16, budget_ratio=0.1, budget_bias=1, tail_blocks=0, residual="mean")
    alone = torch.cat([stem_attention(*part, config=config, backend=backend)[0].transpose(0, 1) for part in parts])
    q, k, v = (torch.cat([part[n][0].transpose(0, 1) for part in parts]) for n in range(3))
    cu_q, cu_k = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in (q_lens, k_lens))
    packed = stem_attention_varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config, backend=backend)
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-5)

    pages = [-(-n // page) for n in k_lens]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((2, max(pages)), -1, dtype=torch.int32)
    caches = [torch.full((sum(pages), page, 1, x.shape[2]), torch.nan, device=x.device) for x in (k, v)]
    for n, used in enumerate(order.split(pages)):
        table[n, : len(used)] = used
        for cache, x in zip(caches, parts[n][1:], strict=True):
            for i, tokens in enumerate(x[0].transpose(0, 1).split(page)):
                cache[used[i], : len(tokens)] = tokens
    paged = stem_attention_paged(
        q, *caches, cu_seqlens_q=cu_q, seq_lens=k_lens, block_table=table.to(q.device), config=config, backend=backend
    )
    torch.testing.assert_close(paged, alone, atol=1e-6, rtol=1e-5)


def test_compiles_to_one_graph() -> None:
    q, k, v = make_qkv(200)
    chosen = selection_of(random_mask(200, 200, 16, heads=4), q, k, 16)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return stem_attention(q, k, v, config=MEAN), block_sparse_attention(q, k, v, chosen, residual="mean")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, v), step(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)


def test_refusals_say_why() -> None:
    q, k, v = make_qkv(64)
    chosen = selection_of(random_mask(64, 64, 16, heads=4), q, k, 16)
    with pytest.raises(ValueError, match="cannot be combined with a window"):
        block_sparse_attention(q, k, v, chosen, residual="mean", window=20)
    with pytest.raises(ValueError, match="residual must be one of none, mean, got 'median'"):
        block_sparse_attention(q, k, v, chosen, residual="median")


def test_automatic_choice_passes_over_a_backend_without_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """FA4 refuses by name; a backend like it, were it the fastest, would be passed over and counted."""
    from stem_attn.backends.fa4 import Fa4Backend

    fa4 = Fa4Backend()
    reason = Fa4Backend.why_unsupported  # what it says of means alone, on a machine where it could run
    layout = Layout.dense(*make_qkv(128, dim=64, dtype=torch.float16))
    plain, means = Call(layout, 128, 0.125), Call(layout, 128, 0.125, residual="mean")
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert reason(fa4, plain) is None
    said = reason(fa4, means)
    assert "residual='mean'" in said
    monkeypatch.undo()

    monkeypatch.setattr(Fa4Backend, "automatic_on", ("cpu",))
    monkeypatch.setattr(Fa4Backend, "why_unsupported", lambda _, call: said if call is means else None)
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: (fa4, None) if name == "fa4" else load(name))
    assert backends.for_call("auto", plain) is fa4
    before = backends.fallbacks().get(f"fa4: {said}", 0)
    assert backends.for_call("auto", means).name == "cpu"
    assert backends.fallbacks()[f"fa4: {said}"] == before + 1
    with pytest.raises(ValueError, match="cannot run this call: it has no kernel that merges the means"):
        backends.for_call("fa4", means)
