"""Pages of an fp8 cache against what PyTorch makes of them; and the kernel compiled for a GPU that is not here."""

import sys

import pytest
import torch

from compiling import compile_for_hopper, run_alone

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts bfloat16 where a GPU rounds.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def random_cache(pages, heads, page_size, width):
    """Every value that fp8 has. Triton's interpreter takes its NaN for 480, so there it is left out."""
    random = torch.Generator().manual_seed(0)
    stored = torch.randint(256, (pages, heads, page_size, width), generator=random).to(torch.uint8)
    if DEVICE == "cpu":
        stored[stored % 128 == 127] = 126
    return stored.view(torch.float8_e4m3fn).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "page_size", "dim"), [(1, 16, 64), (2, 32, 48), (3, 48, 256), (8, 1, 16)])
@pytest.mark.parametrize("per_head", [False, True])
def test_pages_are_what_is_stored_times_the_scale(dtype, heads, page_size, dim, per_head):
    from stem_attn.backends.triton.fp8_pages import widen_pages

    cache = random_cache(11, heads, page_size, 2 * dim)
    table = torch.tensor([[3, 1, 10, 99], [5, 2, 7, 99], [4, 99, 99, 99]], dtype=torch.int32, device=DEVICE)
    lengths = [3 * page_size, 2 * page_size + 1, 1]
    numbers = heads if per_head else 1
    k_scale, v_scale = (torch.linspace(low, 1.7, numbers, device=DEVICE) for low in (0.3, 0.01))
    k_scale = k_scale if per_head else k_scale[0]  # vLLM has numbers without a dimension too
    pages, found = widen_pages(cache, table, lengths, k_scale, v_scale, dtype)
    assert pages.dtype == dtype
    assert found.dtype == torch.int32
    assert pages.shape == (7, heads, page_size, 2 * dim)
    scales = [torch.atleast_1d(scale).view(-1, 1, 1) for scale in (k_scale, v_scale)]
    for n, length in enumerate(lengths):
        for place in range(-(-length // page_size)):
            stored = cache[int(table[n, place])].float()
            expected = torch.cat([part * scale for part, scale in zip(stored.split(dim, -1), scales, strict=True)], -1)
            assert torch.equal(pages[int(found[n, place])].nan_to_num(7.0), expected.to(dtype).nan_to_num(7.0))


def test_any_order_of_a_caches_dimensions_is_read():
    from stem_attn.backends.triton.fp8_pages import widen_pages

    cache = random_cache(5, 16, 4, 32).transpose(1, 2)  # tokens outside, heads inside
    one, table = torch.tensor(1.0, device=DEVICE), torch.tensor([[4, 2]], dtype=torch.int32, device=DEVICE)
    pages, _ = widen_pages(cache, table, [20], one, one, torch.float32)
    assert pages.is_contiguous()
    assert torch.equal(pages.nan_to_num(7.0), cache[[4, 2]].float().nan_to_num(7.0))


def test_it_compiles_for_hopper():
    run_alone(__file__)


if __name__ == "__main__":
    from stem_attn.backends.triton.fp8_pages_kernel import widen_kernel

    for out in ("bf16", "fp16"):
        types = {"cache": "*fp8e4nv", "pages": "*i32", "scales": "*fp32", "out": f"*{out}"}
        compile_for_hopper(widen_kernel, types, {"ROWS": 16, "COLUMNS": 256})
    sys.exit()
