"""Answer a question about a long text with a model of transformers: dense, then with Stem.

python examples/generate.py [MODEL]

The prompt is short, so that this takes less than a minute on a CPU. At 2000 tokens there is no time to gain yet: the
example shows that the answer stays the same. `stem-attn bench --ttft` shows the times at your lengths.
"""

import sys
import time
from pydoc_data.topics import topics  # Python's own documentation: a long text that is always there

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stem_attn import PrefillPolicy, StemConfig
from stem_attn.integrations import hf

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

text = tokenizer("\n\n".join(topics.values())).input_ids
fact = tokenizer("\n\nThe password of the red door is 7956.\n\n").input_ids
question = tokenizer("\n\nThe password of the red door is").input_ids
ids = text[:1500] + fact + text[1500:2000] + question
inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def answer() -> None:
    """Print the answer, and the seconds that reading the prompt and writing the answer took."""
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    print(f"{time.perf_counter() - start:.1f} s:", repr(tokenizer.decode(output[0, len(ids) :])))


answer()

# Small blocks, because 2000 tokens are few: 16 blocks of 128 leave little to choose from.
config = StemConfig(block_size=32, budget_ratio=0.2, budget_bias=0)
hf.enable(model, config, policy=PrefillPolicy(min_seq_len=1024))
answer()
print(hf.stats(model))
