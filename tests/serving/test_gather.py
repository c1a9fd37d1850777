"""Keys and values copied out of vLLM's paged cache on a CPU."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

HEADS, DIM, PAGE = 2, 32, 32
PAGES = [7, 2, 40, 11]
TOKENS = 111  # ends inside the last page


def written(cache, k, v, isa):
    """Put a request's keys and values [tokens, Hkv, D] into its pages, by vLLM's operator."""
    from vllm import _custom_ops as ops

    slots = torch.tensor([page * PAGE + i for page in PAGES for i in range(PAGE)])[: len(k)]
    k_cache, v_cache = cache.view(len(cache), HEADS, 2 * PAGE, DIM).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots, isa)


def request(pages, dtype, pad=0):
    """A cache with a request in it, its keys and values [1, Hkv, T, D], and the instruction set they are packed for."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, PAGE, DIM)
    cache = torch.zeros(pages, HEADS + pad, PAGE, 2 * DIM, dtype=dtype)[:, :HEADS]
    k, v = torch.randn(2, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    written(cache, k, v, isa)
    return cache, k.transpose(0, 1)[None], v.transpose(0, 1)[None], isa


@pytest.mark.parametrize("pad", [0, 1], ids=["pages together", "pages apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_written_is_read(dtype, pad):
    from stem_attn.integrations.vllm.cpu import gather

    cache, k, v, isa = request(48, dtype, pad)
    found_k, found_v = gather(cache, torch.tensor([*PAGES, 0, 0], dtype=torch.int32), TOKENS, isa)
    assert torch.equal(found_k, k)
    assert torch.equal(found_v, v)


def test_a_large_cache_costs_no_memory():
    from stem_attn.integrations.vllm.cpu import gather

    cache, _, _, isa = request(4096, torch.float32)
    pages = torch.tensor(PAGES)
    gather(cache, pages, TOKENS, isa)  # learns the order of keys
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gather(cache, pages, TOKENS, isa)
    copies = len(PAGES) * PAGE * HEADS * DIM * 4
    assert max(event.self_cpu_memory_usage for event in profiled.events()) == copies
