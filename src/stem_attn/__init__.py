"""Stem: training-free block-sparse attention for the prefill of long prompts (arXiv 2603.06274)."""

from stem_attn.api import select_blocks, stem_attention
from stem_attn.attention import block_sparse_attention
from stem_attn.blocks import BlockSelection
from stem_attn.config import StemConfig
from stem_attn.paged import stem_attention_paged
from stem_attn.varlen import stem_attention_varlen

__version__ = "0.1.0"
__all__ = [
    "BlockSelection",
    "StemConfig",
    "block_sparse_attention",
    "select_blocks",
    "stem_attention",
    "stem_attention_paged",
    "stem_attention_varlen",
]
