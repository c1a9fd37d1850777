"""Numbers on their way from the host to the device: in page-locked memory, and in captured graphs."""

import gc

import pytest
import torch

from helpers import make_qkv
from stem_attn import StemConfig, stem_attention_varlen

pytest.importorskip("triton")

from stem_attn.backends.triton import host_numbers
from stem_attn.backends.triton.host_numbers import kept_for_graphs, page_locked, to_device


@pytest.fixture
def arena(monkeypatch):
    """Pieces of 64 numbers, which need no GPU; gives the numbers of each one that was taken."""
    pieces = []
    empty = torch.empty

    def take(size, pin_memory, **how):
        assert pin_memory
        pieces.append(size)
        return empty(size, **how)

    monkeypatch.setattr(host_numbers, "_arena", [])
    monkeypatch.setattr(host_numbers, "ARENA_NUMBERS", 64)
    monkeypatch.setattr(torch, "empty", take)
    return pieces


def test_tables_lie_together_in_page_locked_memory(arena):
    tables = [torch.arange(n, dtype=torch.int32) for n in (5, 30, 24, 1, 200, 9)]
    copies = [page_locked(table) for table in tables]
    assert arena == [64, 64, 200, 64]  # 8 + 32 + 24 fill the first
    assert all(torch.equal(copy, table) for copy, table in zip(copies, tables, strict=True))
    assert all(copy.data_ptr() % 16 == copies[0].data_ptr() % 16 for copy in copies[:3])


def test_page_locked_memory_is_for_every_mode_and_is_no_default_devices(arena):
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            table = torch.arange(5, dtype=torch.int32)
            assert torch.equal(page_locked(table), table)
    assert arena == [64]
    arena.clear()
    with torch.device("meta"):
        assert page_locked(torch.arange(100, dtype=torch.int32, device="cpu")).device.type == "cpu"
    assert arena == [100]


def test_a_thread_that_finds_no_memory_takes_more(arena, monkeypatch):
    class Taken(list):
        """Another thread takes the piece right after this one has seen it."""

        def __bool__(self):
            return True

    monkeypatch.setattr(host_numbers, "_arena", Taken())
    table = torch.arange(5, dtype=torch.int32)
    assert torch.equal(page_locked(table), table)
    assert arena == [64]


def test_what_graphs_copy_from_outlives_its_maker(arena, monkeypatch):
    monkeypatch.setattr(host_numbers, "_captured", {})
    table = torch.arange(5, dtype=torch.int32)
    kept = kept_for_graphs(table)
    table.zero_()
    assert torch.equal(kept, torch.arange(5, dtype=torch.int32))
    assert kept_for_graphs(torch.arange(5, dtype=torch.int32)) is kept
    assert kept_for_graphs(table) is not kept
    assert arena == [64]


def test_without_a_gpu_nothing_is_copied(arena):
    table = torch.arange(5, dtype=torch.int32)
    assert to_device(table, torch.device("cpu")) is table
    assert arena == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_of_packed_sequences_follows_its_inputs():
    def draw(seed):
        tensors = make_qkv(3000, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16, seed=seed)
        return [x[0].transpose(0, 1).cuda() for x in tensors]

    # Short ones are packed for one launch, which reads where each begins.
    how = {"cu_seqlens_q": [*range(0, 3000, 750), 3000], "config": StemConfig(block_size=64, budget_bias=1)}
    inputs = draw(0)
    stem_attention_varlen(*inputs, **how)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stem_attention_varlen(*inputs, **how)
    gc.collect()
    for seed in range(3):
        new = draw(seed)
        for x, numbers in zip(inputs, new, strict=True):
            x.copy_(numbers)
        graph.replay()
        assert torch.equal(out, stem_attention_varlen(*new, **how))
