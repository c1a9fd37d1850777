"""Run every kernel on odd lengths, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/memcheck.py

Without the caching allocator every tensor is an allocation of its own, so that an access past its end is seen. Outputs
are compared with the CPU backend's too.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch
from torch import Tensor

from stem_attn import (
    BlockSelection,
    StemConfig,
    block_sparse_attention,
    stem_attention,
    stem_attention_paged,
    stem_attention_varlen,
)
from stem_attn.backends.triton import attention, score_launches, selection

PAGE = 16
SPARSE = {"budget_ratio": 0.2, "budget_bias": 1, "dense_below": 0, "tail_blocks": 1}
CONFIGS = {
    "official": StemConfig.preset("official", sink_blocks=1, local_blocks=1, **SPARSE),
    "default": StemConfig.preset("default", **SPARSE),
    "linear, shared": StemConfig.preset("default", score="linear", **SPARSE),
    "residual": StemConfig.preset("default", residual="mean", **SPARSE),
}
# Tokens a block, queries, keys, head dim, value dim.
SHAPES = [(128, 1027, 1027, 128, 128), (128, 75, 901, 64, 64), (64, 333, 705, 80, 72), (16, 111, 111, 256, 256)]
SEQUENCES = [(1, 702), (153, 500), (33, 33)]


def draw(q_len: int, k_len: int, dim: int, v_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [1, 4, q_len, dim], k [1, 2, k_len, dim] and v [1, 2, k_len, v_dim]."""
    sizes = ((4, q_len, dim), (2, k_len, dim), (2, k_len, v_dim))
    q, k, v = (torch.randn(1, *size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    return q, k, v


def compare(name: str, got: Tensor, expected: Tensor, allowed: float = 0.01) -> None:
    """Print how far an output is from the expected one, and stop where that is more than rounding."""
    error = float((got.cpu().float() - expected.cpu().float()).norm() / expected.float().norm())
    print(f"{name}: {error:.1e}", flush=True)
    assert error < allowed, "the outputs differ"  # NaN fails too


def check_one(name: str, config: StemConfig, q_len: int, k_len: int, dim: int, v_dim: int) -> None:
    """Select and attend, and attend over the same blocks on the CPU."""
    q, k, v = draw(q_len, k_len, dim, v_dim)
    out, kept = stem_attention(q, k, v, config=config, return_selection=True)
    kept = BlockSelection(kept.indices.cpu(), kept.counts.cpu(), kept.block_size, q_len, k_len)
    host = (x.cpu() for x in (q, k, v))
    expected = block_sparse_attention(*host, kept, residual=config.residual, backend="cpu")
    allowed = 0.01 if config.precision == "auto" else 0.1
    compare(f"{name}, block {config.block_size}, {q_len} of {k_len}, {dim}/{v_dim}", out, expected, allowed)


def check_many(name: str, config: StemConfig) -> None:
    """Attend within packed and within paged sequences, and within each alone."""
    parts = [draw(q_len, k_len, 128, 128) for q_len, k_len in SEQUENCES]
    alone = torch.cat([stem_attention(*part, config=config)[0].transpose(0, 1) for part in parts])
    q, k, v = (torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3))
    starts_q, starts_k = ([0, *torch.tensor(lens).cumsum(0).tolist()] for lens in zip(*SEQUENCES, strict=True))
    packed = stem_attention_varlen(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, config=config)
    compare(f"{name}, packed", packed, alone)
    pages = [-(-k_len // PAGE) for _, k_len in SEQUENCES]
    table = torch.zeros(len(parts), max(pages), dtype=torch.int32)
    caches = [torch.full((sum(pages), PAGE, 2, 128), torch.nan, device="cuda", dtype=k.dtype) for _ in range(2)]
    for n, (part, count) in enumerate(zip(parts, pages, strict=True)):
        first = sum(pages[:n])
        table[n, :count] = torch.arange(first, first + count)
        for cache, x in zip(caches, part[1:], strict=True):
            cache[first : first + count].view(-1, 2, 128)[: x.shape[2]] = x[0].transpose(0, 1)
    lengths = [k_len for _, k_len in SEQUENCES]
    paged = stem_attention_paged(
        q, *caches, cu_seqlens_q=starts_q, seq_lens=lengths, block_table=table.cuda(), config=config
    )
    compare(f"{name}, paged", paged, alone)


def main() -> None:
    """Run the kernels that this GPU gets, and the portable one."""
    fastest, portable = (attention.hopper_fits, score_launches.gluon_runs_on), (lambda *_: False,) * 2
    for kernel, (fits, runs) in (("fastest", fastest), ("portable", portable)):
        selection._launches.cache_clear()
        attend, select = (attention, "hopper_fits", fits), (score_launches, "gluon_runs_on", runs)
        with mock.patch.object(*attend), mock.patch.object(*select):
            for name, config in CONFIGS.items():
                for block_size, *shape in SHAPES:
                    check_one(f"{kernel}, {name}", dataclasses.replace(config, block_size=block_size), *shape)
                check_many(f"{kernel}, {name}", config)
    if torch.cuda.get_device_capability() == (9, 0):
        config = dataclasses.replace(CONFIGS["default"], precision="fp8")
        for block_size, *shape in [*SHAPES[:3], (64, 111, 200, 256, 256), (128, 111, 200, 256, 256)]:
            check_one("fp8", dataclasses.replace(config, block_size=block_size), *shape)
        check_many("fp8", config)
    print("all outputs agree")


if __name__ == "__main__":
    main()
