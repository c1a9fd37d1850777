"""When Stem is not selected nothing changes; when it is, a wrong config stops the start."""

import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

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


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ({"layer_budgets": [1.0, 0.5, 1.0]}, "layer_budgets has 3 factors, and the model has 2 layers"),
        ({"dense_layers": [2]}, r"dense_layers \(2,\) are not all layers of a model with 2"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_weights_are_loaded(folders, tmp_path, stem, message):
    shutil.copy(Path(folders("llama")) / "config.json", tmp_path)  # there are no weights
    with pytest.raises(ValueError, match=message), engine(str(tmp_path), {**SPARSE, **stem}):
        pass


def test_a_draft_model_may_have_another_number_of_layers(folders, monkeypatch):
    with engine(folders("llama"), {**SPARSE, "layer_budgets": [1.0, 0.5]}) as llm:
        (builder,) = builders(llm)
        config = builder.vllm_config
        layers = attention_layers(llm).values()
        again = partial(type(builder), builder.kv_cache_spec, builder.layer_names, config, builder.device)
        monkeypatch.setattr(type(config.model_config), "get_total_num_hidden_layers", lambda self: 3)
        for layer in layers:
            monkeypatch.setattr(layer, "is_draft_layer", True, raising=False)
        again()
        assert {layer.impl.dense_reason for layer in layers} == {"draft model"}
        for layer in layers:
            layer.is_draft_layer, layer.impl.dense_reason = False, None
        with pytest.raises(ValueError, match="layer_budgets has 2 factors, and the model has 3 layers"):
            again()


def test_the_name_survives_a_process_that_has_not_loaded_plugins():
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    data = pickle.dumps(AttentionBackendEnum["STEM"])
    code = f"import pickle; print(pickle.loads({data!r}).get_class().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("StemCpuBackend"), done.stderr
