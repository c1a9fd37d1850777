"""Stem: training-free block-sparse attention for the prefill of long prompts (arXiv 2603.06274)."""

from stem_attn.api import (
    block_sparse_attention,
    select_blocks,
    stem_attention,
    stem_attention_paged,
    stem_attention_varlen,
)
from stem_attn.blocks import BlockSelection
from stem_attn.config import StemConfig
from stem_attn.paged import PagedPrefill
from stem_attn.policy import PrefillPolicy
from stem_attn.warm_up import warm_up

__version__ = "0.2.0"
__all__ = [
    "BlockSelection",
    "PagedPrefill",
    "PrefillPolicy",
    "StemConfig",
    "block_sparse_attention",
    "select_blocks",
    "stem_attention",
    "stem_attention_paged",
    "stem_attention_varlen",
    "warm_up",
]
