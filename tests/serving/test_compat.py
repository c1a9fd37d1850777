"""Which vLLM is registered with, and what is read from the V2 runner: made up, a CPU would need another Triton."""

import copy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


def registered(monkeypatch, caplog):
    """Register as a new process does; return what was registered, and what was warned of."""
    from vllm.v1.attention.backends import registry

    from stem_attn.integrations.vllm import register

    made = []
    really = registry.register_backend
    monkeypatch.setattr(registry, "register_backend", lambda *given: made.append(given) or really(*given))
    register._fits.cache_clear()
    for _ in range(2):
        register.register()
    register._fits.cache_clear()
    return made, caplog.messages


def test_the_installed_version_has_what_is_used():
    from stem_attn.integrations.vllm.compat import why_unsupported

    assert why_unsupported("cpu") is None
    assert why_unsupported("cuda") is None


def test_a_version_that_lacks_something_is_not_registered_with(monkeypatch, caplog):
    from stem_attn.integrations.vllm import compat

    monkeypatch.setattr(compat, "missing", lambda offer, parts: [f"a.b.{parts[1]} is gone", "c.d is gone"])
    monkeypatch.setattr(compat, "VLLM_VERSION", "9.9")
    made, warned = registered(monkeypatch, caplog)
    assert made == []
    assert warned == [
        "stem-attn does not know this vLLM, 9.9: a.b.cpu is gone; c.d is gone. The attention backend STEM is not "
        "registered"
    ]


def test_a_version_that_nobody_has_run_is_registered_with_and_warned_of(monkeypatch, caplog):
    from stem_attn.integrations.vllm import compat

    assert compat.why_unknown("cpu", "0.32.1.dev3+cpu") is None
    assert compat.why_unknown("cuda", "0.26.0") is compat.why_unknown("cuda", "0.32.0") is None
    newer = "stem-attn was run on vLLM 0.26, 0.32, 0.33 on CUDA, and this is 0.34.0"
    assert compat.why_unknown("cuda", "0.34.0") == newer
    unknown = compat.why_unknown("cpu", "0.320.1")
    assert unknown == "stem-attn was run on vLLM 0.32 on CPU, and this is 0.320.1"
    monkeypatch.setattr(compat, "why_unknown", lambda platform: unknown)
    made, warned = registered(monkeypatch, caplog)
    assert made
    assert warned == [f"{unknown}: it has what is needed, so the attention backend STEM is registered"]


OPTIONAL = ("V1 runner", "V2 runner", "requests")


@pytest.fixture
def without(monkeypatch):
    """A function that takes members away from what the installed vLLM offers of the optional parts."""
    import vllm

    from stem_attn.integrations.vllm import compat

    offered = compat.read_offer(Path(vllm.__path__[0]).parent, OPTIONAL)
    left = copy.deepcopy(offered)
    monkeypatch.setattr(compat, "read_offer", lambda root, parts: left)
    for part, runner in (("V1 runner", SimpleNamespace), ("V2 runner", Runner)):
        monkeypatch.setitem(sys.modules, compat._RUNNERS[part], SimpleNamespace(GPUModelRunner=runner))

    def take(owner, member):
        left.clear()
        left.update(copy.deepcopy(offered))
        del left[owner][member]
        compat.lacks.cache_clear()

    yield take
    compat.lacks.cache_clear()


@pytest.mark.parametrize("part", OPTIONAL)
def test_whatever_an_optional_part_lacks_is_named_with_what_happens(without, part):
    from stem_attn.integrations.vllm import compat, interface

    assert compat.does_without() == []
    for owner, wanted in interface._PARTS[part].items():
        for want in wanted:
            member = interface._parse(want)[1]
            without(owner, member)
            happens = (
                "requests have the server's settings"
                if part == "requests"
                else f"with the {part.replace(' ', ' model ')}"
            )
            (line,) = compat.does_without()
            assert line.startswith(f"{owner}.{member} is gone: {happens}")


def test_of_a_runner_that_is_not_loaded_nothing_is_said(without, monkeypatch):
    from stem_attn.integrations.vllm import compat

    without("vllm.v1.worker.gpu.states:RequestState", "prompt_len")
    monkeypatch.delitem(sys.modules, compat._RUNNERS["V2 runner"])
    assert compat.does_without() == []


@pytest.mark.parametrize("lacking", [None, "prompt_len", "index_to_req_id"])
def test_a_runner_that_lacks_something_is_not_asked(without, lacking):
    from stem_attn.integrations.vllm.compat import Requests

    runner = Runner()
    if lacking is not None:
        without("vllm.v1.worker.gpu.states:RequestState", lacking)
        delattr(runner.req_states, lacking)
    told = runner.build(Requests("stem"), batch_of(["in its prompt"], [512], [256], [True]))
    assert [(one.prompt_len, one.known) for one in told] == [(None, False) if lacking else (1000, True)]


def test_where_choices_cannot_be_read_nobody_looks_for_them_and_the_option_stops_the_start(without):
    from stem_attn.integrations.vllm.compat import Requests
    from stem_attn.integrations.vllm.per_request import PerRequest

    PerRequest()
    without("vllm.v1.core.sched.output:SchedulerOutput", "scheduled_new_reqs")

    def execute_model(scheduler_output):
        requests = Requests("stem")
        requests.note_new()
        return Runner().build(requests, batch_of(["in its prompt"], [512], [256], [True]))

    assert [(one.prompt_len, one.asked) for one in execute_model(SimpleNamespace())] == [(1000, None)]
    with pytest.raises(ValueError, match=r"SchedulerOutput\.scheduled_new_reqs is gone\): start without --logits-pro"):
        PerRequest()


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
            prompt_len=SimpleNamespace(np=lengths[:, 0]),
            prefill_len=SimpleNamespace(np=lengths[:, 1]),
            index_to_req_id=dict(enumerate(REQUESTS)),
            req_id_to_index={name: i for i, name in enumerate(REQUESTS)},
        )

    def build(self, requests, common):
        """Ask as a metadata builder does that this calls."""
        return requests.of(common)


def batch_of(names, before, tokens, prefilling):
    """Metadata of a step: of each row the request, its tokens before the step and in it, and whether it is prefill."""
    return SimpleNamespace(
        req_idx=np.array([list(REQUESTS).index(name) for name in names]),
        is_prefilling=torch.tensor(prefilling),
        seq_lens_cpu_upper_bound=torch.tensor(before) + torch.tensor(tokens),
        query_start_loc_cpu=torch.tensor([0, *tokens]).cumsum(0),
    )


@pytest.mark.parametrize("told_by", ["the metadata", "the runner's batch"])
def test_a_preempted_request_keeps_its_prompts_length_in_the_v2_runner(told_by):
    from stem_attn.integrations.vllm.compat import Requests

    names, before, tokens, prefilling, expected = zip(*ROWS, strict=True)
    common = batch_of(names, before, tokens, prefilling)
    runner, lengths = Runner(), Requests("stem")
    lengths._runner = weakref.ref(runner)

    def build(input_batch):  # the runner's method, as 0.26 has it
        return lengths.of(common)

    if told_by == "the metadata":
        told = build(None)
    else:
        requests = common.req_idx
        del common.req_idx
        told = build(SimpleNamespace(idx_mapping_np=requests))
    assert [one.prompt_len for one in told] == list(expected)


def test_what_a_request_asks_for_is_kept_after_its_first_step_in_the_v2_runner():
    from stem_attn.integrations.vllm.compat import Requests

    def new(name, extra_args):
        return SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra_args))

    def asked(scheduler_output, *rows):
        n = len(rows)
        return [one.asked for one in requests.of(batch_of(rows, [0] * n, [64] * n, [True] * n))]

    runner, requests = Runner(), Requests("stem")
    requests._runner = weakref.ref(runner)
    first, plain, pooled = new("in its prompt", {"stem": 2, "other": 1}), new("decoding", None), new("preempted", {})
    step = SimpleNamespace(scheduled_new_reqs=[first, plain, pooled])
    assert asked(step, "decoding", "in its prompt") == [None, 2]
    later = SimpleNamespace(scheduled_new_reqs=[])
    assert asked(later, "in its prompt", "preempted") == [2, None]
    # Finished requests are forgotten when another one asks.
    del runner.req_states.req_id_to_index["in its prompt"]
    asked(SimpleNamespace(scheduled_new_reqs=[new("preempted", {"stem": "dense"})]), "preempted")
    assert requests._asked == {"preempted": "dense"}
