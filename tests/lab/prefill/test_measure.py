import time

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_model
from stem_attn.lab.prefill.measure import AttentionClock, PeakMemory


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))


def test_attention_clock_sees_only_attention():
    model = tiny_model.model()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return before(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", slow)
    try:
        with AttentionClock(model, lambda: None) as clock, torch.no_grad():
            time.sleep(0.2)
            model(ids(32))
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", before)
    assert 0.1 <= clock.seconds < 0.2


def test_peak_memory_sees_what_was_freed_again():
    size = 200 * 2**20
    with PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(size // 4)
        time.sleep(0.05)
        del held
    assert 0.9 * size < memory.bytes < 1.2 * size
