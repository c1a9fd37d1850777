"""Read a prompt in chunks of 1024 tokens, each into the same cache, and get what one pass gives.

python examples/chunked_prefill.py [MODEL]
"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from stem_attn import PrefillPolicy, StemConfig
from stem_attn.integrations import hf

TOKENS, CHUNK = 3072, 1024  # a chunk ends where a block ends: 1024 is a multiple of 64

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
ids = torch.tensor([tokenizer("\n\n".join(topics.values())).input_ids[:TOKENS]])

config = StemConfig(block_size=64, budget_ratio=0.2, budget_bias=0)
hf.enable(model, config, policy=PrefillPolicy(min_seq_len=1024, crossover=False))

with torch.no_grad():
    whole = model(ids, logits_to_keep=1).logits
    print("in one pass:", hf.stats(model).tokens, f"density {hf.stats(model).density:.0%}")

    hf.reset_stats(model)
    cache = DynamicCache(config=model.config)
    # The budget is that of the whole prompt, so say how long it is.
    with hf.prompt_length(model, TOKENS):
        for chunk in ids.split(CHUNK, dim=1):
            output = model(chunk, past_key_values=cache, logits_to_keep=1)
    print("in chunks:  ", hf.stats(model).tokens, f"density {hf.stats(model).density:.0%}")

difference = (output.logits - whole).abs().max().item()
print(f"largest difference of the logits: {difference:.1e}, of logits up to {whole.abs().max().item():.0f}")
assert difference < 1e-2 * whole.abs().max().item()
