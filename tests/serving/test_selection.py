"""When Stem is not selected nothing changes; when it is, a wrong config stops the start."""

import json
import pickle
import subprocess
import sys

import pytest
from engines import SPARSE, answer, attention_layers, builders, engine, stats
from tiny_families import greedy, prompt

from stem_attn import StemConfig

PROMPTS = [prompt(n, seed) for seed, n in enumerate((300, 33))]


def test_unselected_the_classes_are_vllms_own(folders):
    from vllm.v1.attention.backends import cpu_attn

    # The plugin is installed and its config given: only the backend's name switches it on.
    with engine(folders("llama"), additional_config={"stem": SPARSE}) as llm:
        assert {type(layer.impl) for layer in attention_layers(llm).values()} == {cpu_attn.CPUAttentionBackendImpl}
        assert {type(builder) for builder in builders(llm)} == {cpu_attn.CPUAttentionMetadataBuilder}
        assert answer(llm, PROMPTS) == greedy(folders("llama"), PROMPTS, 8)


def test_custom_is_another_name_and_a_config_file_is_read(folders, tmp_path):
    file = tmp_path / "tuned.json"
    # The budget alone keeps everything of 10 blocks; the first layer's factor leaves it 4.
    own = {"layer_budgets": (0.3, 1.0), "dense_layers": (-1,), "min_seq_len": 64}
    file.write_text(json.dumps({**json.loads(StemConfig(block_size=32, budget_ratio=0.3).to_json()), **own}))
    stem = {"preset": "paper", "config_file": str(file), "stride": 4, "crossover": False}
    with engine(folders("llama"), stem, attention_backend="CUSTOM") as llm:
        settings = {layer.impl.settings for layer in attention_layers(llm).values()}
        (config,) = {s.config for s in settings}
        assert (config.block_size, config.budget_ratio, config.stride) == (32, ((None, 0.3),), 4)
        answer(llm, PROMPTS, new_tokens=1)
        assert stats(llm)["sparse_tokens"] == 300
        assert stats(llm)["dense_tokens"] == {"short prompt": 33, "dense layer": 333}
        assert stats(llm)["density"] < 0.8


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ({"budget_ration": 0.1}, "unknown key budget_ration"),
        ({"budget_ratio": 2}, "budget_ratio must be a finite"),
        ({"precision": "fp8"}, "no backend can run this call with precision='fp8'"),
    ],
)
def test_a_wrong_config_stops_the_start(folders, stem, message):
    with pytest.raises(ValueError, match=message), engine(folders("llama"), stem):
        pass


def test_the_name_survives_a_process_that_has_not_loaded_plugins():
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    data = pickle.dumps(AttentionBackendEnum["STEM"])
    code = f"import pickle; print(pickle.loads({data!r}).get_class().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("StemCpuBackend"), done.stderr
