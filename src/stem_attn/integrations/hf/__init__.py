"""Hugging Face transformers: sparse prefill in an unchanged model.

    from stem_attn.integrations import hf

    hf.enable(model)  # checks the model, then routes its prefill through Stem
    model.generate(**inputs)
    print(hf.stats(model))
    hf.disable(model)

Checked with transformers 5.17, 5.23 and 5.24.
"""

from stem_attn.integrations.hf.counters import Stats
from stem_attn.integrations.hf.enable import disable, enable, prompt_length, reset_stats, stats
from stem_attn.integrations.hf.register import register

__all__ = ["Stats", "disable", "enable", "prompt_length", "register", "reset_stats", "stats"]
