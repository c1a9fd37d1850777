"""Find a budget for every layer with `stem-attn tune`, and use the file that it writes.

python examples/tune_and_use.py [MODEL]
"""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stem_attn.integrations import hf
from stem_attn.policy import make_settings, read_settings

TOKENS = 160  # short, so that it takes less than a minute; tune at the length that matters to you

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tuned.json"
    options = ["--length", str(TOKENS), "--prompts", "1", "--held-out", "0", "--target", "kl=0.05"]
    small = ["--set", "block_size=16", "--set", "min_seq_len=128", "--set", "budget_ratio=0.1"]
    command = [sys.executable, "-m", "stem_attn", "tune", "--model", name, *options, *small]
    subprocess.run([*command, "--device", "cpu", "--out", str(file)], check=True)
    config, policy = make_settings(read_settings(file))

print("budgets by layer:", policy.layer_budgets or "one for all")
tokenizer = AutoTokenizer.from_pretrained(name)
policy = replace(policy, crossover=False)  # so few tokens gain no time, and would stay dense
model = hf.enable(AutoModelForCausalLM.from_pretrained(name), config, policy=policy)
ids = torch.tensor([tokenizer("\n\n".join(topics.values())).input_ids[:TOKENS]])
with torch.no_grad():
    model(ids, logits_to_keep=1)
print(hf.stats(model))
