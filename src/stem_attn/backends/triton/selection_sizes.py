"""What shapes and the method decide about a selection, before anything is launched."""

from __future__ import annotations

import torch
import triton

from stem_attn.backends.triton.devices import can_chain
from stem_attn.backends.triton.launch import Launch
from stem_attn.blocks import BlockGrid
from stem_attn.config import StemConfig

Steps = list[tuple[Launch, tuple[str, ...]]]
"""Launches in order, each with the names of its tensors (and of numbers that are known at a call only)."""


class Sizes:
    """Numbers that the launches of a selection share.

    Args:
        q_shape: [B, Hq, Tq, D].
        k_shape: [B, Hkv, Tk, D], as if not paged.
        dtype: Of the inputs.
        device: Of the inputs.
        config: The method.
    """

    def __init__(
        self,
        q_shape: tuple[int, ...],
        k_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        config: StemConfig,
    ) -> None:
        self.grid = grid = BlockGrid(q_shape[2], k_shape[2], config.block_size)
        self.device, self.dtype = device, dtype
        self.cuda = device.type == "cuda" and torch.version.hip is None
        self.chained = self.cuda and can_chain(device)
        self.batch, self.heads, _, self.dim = q_shape
        self.config, self.kv_heads, self.group = config, k_shape[1], self.heads // k_shape[1]
        scopes = {"head": 0, "group": 1, "layer": self.kv_heads}
        self.rivals = scopes[config.budget_scope] * self.group
        self.scope = scopes[config.budget_scope] if self.rivals > 1 else 0  # KV heads whose query heads share budgets
        self.all_heads = self.batch * self.kv_heads
        self.q_rows, self.k_rows = self.batch * self.heads * grid.q_blocks, self.all_heads * grid.k_blocks
        self.mass = config.score == "mass"
        self.per_block = grid.block_size // config.stride
        self.q_stride = config.query_stride if self.mass else config.stride
        self.slots = self.per_block if self.mass else config.stride
        self.q_slots = grid.block_size // self.q_stride if self.mass else config.stride
        self.groups = grid.k_len // config.stride
        zscore = config.value_term == "zscore"
        self.zscored = zscore and self.groups > 1  # one group has no deviation
        self.valued = config.value_term == "log" or self.zscored
        self.spread = self.mass and config.spread_weight > 0
        dims = self.dim + (self.dim + 1) // 2 if self.spread else self.dim
        self.dim_out = triton.cdiv(dims, 8) * 8  # rows of whole 16 bytes
        self.pooled_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        self.pitch = triton.cdiv(grid.k_blocks, 16) * 16
        # Where runs are pooled, key blocks lie in fours.
        key_blocks = triton.cdiv(grid.k_blocks, 4) * 4
        self.pooled_shape = self.q_rows + self.k_rows, self.slots * self.dim_out
        if self.mass:
            self.pooled_shape = self.q_rows * self.q_slots + self.all_heads * key_blocks * self.slots, self.dim_out

    def chain(self, options: dict[str, int]) -> dict[str, int]:
        """Let a kernel start before its predecessor has ended: it waits itself before it reads or writes anything."""
        return options | {"launch_pdl": True} if self.chained else options
