"""The vLLM benchmark without vLLM: a stand-in for its module answers, in processes of their own as ever."""

import json
import sys
from importlib.util import find_spec

import pytest

from stem_attn import cli
from stem_attn.lab.shapes import MODELS

STAND_IN = '''
"""As much of vLLM as the benchmark asks."""
import os
import time
from pathlib import Path
from types import SimpleNamespace

RUNNING = Path(__file__).with_name("running")
STARTING = Path(__file__).with_name("starting")

__version__ = "0.32.1"


def SamplingParams(**kwargs):
    return SimpleNamespace(**kwargs)


class LLM:
    def __init__(self, **options):
        self.stem = options.get("additional_config")
        self.chunk = options["max_num_batched_tokens"]
        self.devices = options["tensor_parallel_size"]
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: RUNNING.unlink(missing_ok=True)))
        self.cache = options.get("kv_cache_memory_bytes")
        self.chooses = "logits_processors" in options
        if self.cache:  # its starting lasts until another engine's begins
            STARTING.mkdir(exist_ok=True)
            (STARTING / str(os.getpid())).touch()
            end = time.monotonic() + 60
            while len(list(STARTING.iterdir())) < 2 and time.monotonic() < end:
                time.sleep(0.01)
        self.together = self.cache and len(list(STARTING.iterdir()))
        self.alone = not RUNNING.exists()
        RUNNING.touch()

    def collective_rpc(self, name):
        assert self.stem is not None
        told = {"config": self.stem["stem"], "chunk": self.chunk, "alone": self.alone, "devices": self.devices}
        return [told | {"cache": self.cache, "together": self.together, "asked": getattr(self, "asked", None)}]

    def generate(self, prompts, asked, use_tqdm):
        tokens = len(prompts[0]["prompt_token_ids"])
        self.asked = asked.extra_args
        assert self.chooses or not self.asked
        first = tokens / (2000 if self.stem and not self.asked else 1000)
        return [SimpleNamespace(metrics=SimpleNamespace(
            first_token_latency=first, first_token_ts=1.0, last_token_ts=1.0 + asked.max_tokens - 1
        ))]
'''


def forget():
    """Let the next import of vLLM, and of what looks at its version, find what is there then."""
    for name in list(sys.modules):
        if name.split(".")[0] == "vllm" or name == "stem_attn.integrations.vllm.compat":
            del sys.modules[name]


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "version.py").write_text('__version__ = "0.32.1"\n')
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield
    forget()


def test_engines_take_turns_and_every_number_is_written(vllm, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = ["--shape", "smollm2", "--lengths", "600,300", "--chunks", "128,256", "--max-tokens", "3"]
    arguments += ["--rounds", "2", "--stem", '{"preset": "official"}', "--out", str(out)]
    assert cli.run(["serving", *arguments]) == 0, capfd.readouterr().err
    found = json.loads((out / "vllm_prefill.json").read_text())
    assert found["command"] == "serving"
    assert found["vllm"] == "0.32.1"
    assert found["settings"]["stem"] == {"preset": "official"}
    assert [(r["chunk"], r["length"]) for r in found["records"]] == [(128, 600), (128, 300), (256, 600), (256, 300)]
    for record in found["records"]:
        assert record["first_token_seconds"] == {"dense": record["length"] / 1000, "stem": record["length"] / 2000}
        warm = min(512, record["length"])
        assert record["warm_up_seconds"] == {"dense": warm / 1000, "stem": warm / 2000}
        assert record["next_token_seconds"] == {"dense": 1.0, "stem": 1.0}
        assert [len(runs) for runs in record["runs"].values()] == [2, 2]
        assert {run["stats"]["chunk"] for run in record["runs"]["stem"]} == {record["chunk"]}
        assert not any(run["stats"]["alone"] for run in record["runs"]["stem"])
        assert all(run["stats"] is None for run in record["runs"]["dense"])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "first token dense 0.600 s, Stem 0.300 s, ratio 2.00; in the warm-up before, 0.512 and 0.256 s" in lines[0]


def test_in_turn_the_second_engine_has_the_devices_alone(vllm, tmp_path, capfd):
    arguments = ["--shape", "llama3-70b", "--lengths", "600,300", "--chunks", "128", "--rounds", "2", "--in-turn"]
    arguments += ["--tensor-parallel-size", "4", "--out", str(tmp_path)]
    assert cli.run(["serving", *arguments]) == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "vllm_prefill.json").read_text())["records"]
    assert [record["length"] for record in found] == [600, 300]
    for record in found:
        assert record["first_token_seconds"] == {"dense": record["length"] / 1000, "stem": record["length"] / 2000}
        assert [(run["stats"]["alone"], run["stats"]["devices"]) for run in record["runs"]["stem"]] == [(True, 4)] * 2


def test_with_a_cache_of_a_size_both_engines_start_at_once(vllm, tmp_path, capfd):
    arguments = ["--shape", "smollm2", "--lengths", "300", "--chunks", "128", "--rounds", "1", "--cache", "0.5"]
    assert cli.run(["serving", *arguments, "--out", str(tmp_path)]) == 0, capfd.readouterr().err
    (record,) = json.loads((tmp_path / "vllm_prefill.json").read_text())["records"]
    (run,) = record["runs"]["stem"]
    assert (run["stats"]["cache"], run["stats"]["together"]) == (2**29, 2)


def test_one_engine_answers_dense_and_sparse_where_requests_ask_for_it(vllm, tmp_path, capfd):
    arguments = ["--shape", "smollm2", "--lengths", "300", "--chunks", "128", "--rounds", "2"]
    assert cli.run(["serving", *arguments, "--sides", "by-request,stem", "--out", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "vllm_prefill.json").read_text())["records"]
    assert record["first_token_seconds"] == {"by-request": 0.3, "stem": 0.15}
    assert [run["stats"]["asked"] for run in record["runs"]["by-request"]] == [{"stem": "dense"}] * 2
    assert [(run["stats"]["asked"], run["stats"]["alone"]) for run in record["runs"]["stem"]] == [(None, True)] * 2
    said = capfd.readouterr().out
    assert "first token dense by request 0.300 s, Stem 0.150 s, ratio 2.00; in the warm-up" in said


def test_one_side_alone_is_timed(vllm, tmp_path, capfd):
    arguments = ["--shape", "smollm2", "--lengths", "300", "--chunks", "128", "--rounds", "1", "--sides", "dense"]
    assert cli.run(["serving", *arguments, "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert said == "300 tokens in chunks of 128: first token dense 0.300 s; in the warm-up before, 0.300 s\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --model or --shape"),
        (["--model", "m", "--shape", "smollm2"], "give --model or --shape"),
        (["--model", "./nowhere"], "no such model folder: ./nowhere"),
        (["--shape", "gpt"], f"--shape must be one of {', '.join(MODELS)}"),
        (["--shape", "smollm2", "--execution", "fast"], "--execution must be one of eager, graphs, compiled"),
        (
            ["--shape", "smollm2", "--dtype", "int8"],
            "--dtype must be one of auto, float32, bfloat16, float16; got 'int8'",
        ),
        (["--shape", "smollm2", "--backend", "FAST"], "--backend must be one of STEM, CUSTOM, got 'FAST'"),
        (["--shape", "smollm2", "--stem", "{"], "--stem takes a JSON object"),
        (["--shape", "smollm2", "--stem", "[]"], "--stem takes a JSON object"),
        (["--shape", "smollm2", "--stem", '{"budget_ration": 1}'], "--stem: unknown key budget_ration"),
        (["--shape", "smollm2", "--memory", "3"], "--memory takes a share above 0, at most 1, got 3"),
        (["--shape", "smollm2", "--cache", "0"], "--cache takes GiB above 0, got 0"),
        (["--shape", "smollm2", "--sides", "dense,fast"], "--sides takes some of dense, stem, by-request, each once"),
        (["--shape", "smollm2", "--sides", "stem,stem"], "--sides takes some of dense, stem, by-request, each once"),
        (["--shape", "smollm2", "--chunks", "1k"], "--chunks takes positive whole numbers"),
    ],
)
def test_wrong_options_end_in_one_line(vllm, arguments, said, tmp_path, capsys):
    assert cli.run(["serving", "--out", str(tmp_path), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "running").exists()  # no engine has started


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "gpt"], "--shape must be one of"),
        (["--shape", "smollm2", "--chunks", "1k"], "--chunks takes positive whole numbers"),
        (["--shape", "smollm2"], 'this needs vllm: pip install "stem-attn[vllm]"'),
    ],
)
def test_options_are_checked_before_vllm_is_asked_for(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stem_attn.lab.errors.find_spec", lambda name: None if name == "vllm" else find_spec(name))
    assert cli.run(["serving", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err
