"""Compare ways of choosing blocks at the same density, by their distance to dense attention.

python examples/compare_methods.py

The inputs are random, but not without structure: some keys stand out, as in a real model. For numbers that mean
something run `stem-attn eval fidelity` on your model.
"""

import torch

from stem_attn import methods, stem_attention
from stem_attn.methods.knob import match_density

TOKENS, BLOCK, DENSITY = 2048, 32, 0.3

torch.manual_seed(0)
topics = torch.randn(16, 64)
topic_of_token = torch.randint(16, (TOKENS // BLOCK,)).repeat_interleave(BLOCK)
k = topics[topic_of_token] + torch.randn(1, 2, TOKENS, 64)
q = topics[topic_of_token.roll(BLOCK)] + torch.randn(1, 8, TOKENS, 64)
v = torch.randn(1, 2, TOKENS, 64)
dense = stem_attention(q, k, v, method=methods.make("dense", block_size=BLOCK))

print(f"{'method':14s} kept   error")
for name in ("stem", "xattention", "flashprefill", "minference", "a_shape"):
    method = match_density(methods.make(name, block_size=BLOCK), q, k, v, DENSITY)
    out, selection = stem_attention(q, k, v, method=method, return_selection=True)
    error = (out - dense).norm() / dense.norm()
    print(f"{name:14s} {selection.density():4.0%}  {error:6.3f}")
