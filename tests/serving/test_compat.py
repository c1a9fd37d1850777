"""What is read from vLLM's V2 model runner, which on a CPU needs a Triton for CPUs: here it is made up."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

# Tokens of the prompt, and how many the V2 runner calls prefill: a preempted request's answer is computed again as one.
REQUESTS = {"preempted": (640, 700), "decoding": (100, 100), "in its prompt": (1000, 1000)}
ROWS = [  # request, tokens computed before the step, tokens of the step, whether vLLM calls it prefill, what is told
    ("decoding", 110, 1, False, 100),
    ("in its prompt", 512, 256, True, 1000),
    ("preempted", 512, 128, True, 640),
    ("preempted", 640, 60, True, 640),  # nothing but its answer
    ("preempted", 699, 1, True, 640),
    ("preempted", 700, 1, False, 640),
    ("in its prompt", 1000, 1, True, None),  # the runner and vLLM disagree
    ("preempted", 699, 1, False, None),
]


class Runner:
    def __init__(self):
        lengths = np.array([*REQUESTS.values(), (0, 0)], dtype=np.int32)
        self.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=lengths[:, 0]), prefill_len=SimpleNamespace(np=lengths[:, 1])
        )


@pytest.mark.parametrize("told_by", ["the metadata", "the runner's batch"])
def test_a_preempted_request_keeps_its_prompts_length_in_the_v2_runner(told_by):
    from stem_attn.integrations.vllm.compat import PromptLengths

    names, before, tokens, prefilling, expected = zip(*ROWS, strict=True)
    requests = np.array([list(REQUESTS).index(name) for name in names])
    common = SimpleNamespace(
        is_prefilling=torch.tensor(prefilling),
        seq_lens_cpu_upper_bound=torch.tensor(before) + torch.tensor(tokens),
        query_start_loc_cpu=torch.tensor([0, *tokens]).cumsum(0),
    )
    runner, lengths = Runner(), PromptLengths()
    lengths._runner = weakref.ref(runner)

    def build(input_batch):  # the runner's method, as 0.26 has it
        return lengths.of(common)

    if told_by == "the metadata":
        common.req_idx = requests
        told = build(None)
    else:
        told = build(SimpleNamespace(idx_mapping_np=requests))
    assert told == list(expected)
