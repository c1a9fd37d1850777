"""Choose blocks by a rule of your own: keep the blocks whose mean key looks most like the mean query.

python examples/own_method.py
"""

import torch
from torch import Tensor

from stem_attn import BlockSelection, stem_attention

BLOCK, KEPT = 64, 8


class MeanKeys:
    """Keep, in every row, the blocks with the largest product of mean query and mean key."""

    block_size = BLOCK

    def select(self, q: Tensor, k: Tensor, v: Tensor, *, scale=None, prompt_len=None) -> BlockSelection:
        """Return the kept blocks; this sketch takes whole prompts, in whole blocks."""
        queries = q.unflatten(2, (-1, BLOCK)).mean(3)  # [B, Hq, blocks, D]
        keys = k.unflatten(2, (-1, BLOCK)).mean(3).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = queries @ keys.mT  # [B, Hq, blocks, blocks]
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores.masked_fill_(future, -torch.inf)
        scores.diagonal(dim1=2, dim2=3).fill_(torch.inf)  # every row must keep its own block
        best = scores.topk(min(KEPT, scores.shape[3])).indices
        mask = torch.zeros_like(future).scatter(3, best, True) & ~future
        return BlockSelection.from_mask(mask, block_size=BLOCK, q_len=q.shape[2], k_len=k.shape[2])


torch.manual_seed(0)
q, k, v = torch.randn(1, 8, 4096, 64), torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64)
out, selection = stem_attention(q, k, v, method=MeanKeys(), return_selection=True)
print(f"output {list(out.shape)}, {selection.density():.0%} of the blocks kept")
# A whole model: hf.enable(model, method=MeanKeys())
