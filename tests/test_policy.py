import pytest
import torch

from stem_attn import PrefillPolicy, StemConfig
from stem_attn.backends.base import Geometry
from stem_attn.backends.cpu import CpuBackend
from stem_attn.blocks import BlockGrid
from stem_attn.config import field_names
from stem_attn.policy import make_settings, policy_field_names, read_settings

CPU = Geometry("cpu", torch.float32, 64, 0)


def why_dense(policy, length, config="default", told=None, backend=CPU):
    config = StemConfig.preset(config)
    calls = [(length, BlockGrid(length, length, config.block_size))]
    return policy.why_dense(config, calls, told, CpuBackend() if backend is CPU else backend, CPU)


def test_presets():
    assert PrefillPolicy.preset("default") == PrefillPolicy()
    assert PrefillPolicy.preset("default-0.1") == PrefillPolicy(depth_decay=1.0)
    assert PrefillPolicy.preset("official") == PrefillPolicy(min_seq_len=0, dense_layers=(0, 1), depth_decay=1.0)
    paper = PrefillPolicy(min_seq_len=8192, crossover=False, depth_decay=1.0)
    assert PrefillPolicy.preset("paper", crossover=False) == paper
    with pytest.raises(ValueError, match=r"unknown preset .fast.; known: default, default-0.1, official, paper"):
        PrefillPolicy.preset("fast")


def test_no_field_is_the_methods_too():
    assert not set(policy_field_names()) & set(field_names())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_layers": (0, "1")}, "dense_layers"),
        ({"dense_layers": 3}, "dense_layers"),
        ({"layer_budgets": 2.0}, "layer_budgets must be a sequence of factors, one a layer, got 2.0"),
        ({"layer_budgets": [1.0, -1]}, "layer_budgets must be a finite number from 0"),
        ({"layer_budgets": [1.0, "2"]}, "layer_budgets"),
        ({"min_seq_len": None}, "min_seq_len"),
        ({"depth_decay": 0}, "depth_decay must be above 0"),
        ({"depth_decay": 1.5}, "depth_decay must be a finite number from 0 to 1"),
        ({"crossover": 1}, "crossover must be True or False"),
        ({"audit_rows": -1}, "audit_rows must be an int"),
        ({"audit_rows": 100, "min_recall": 1.5}, "min_recall must be a finite number from 0 to 1"),
        ({"audit_rows": 100, "max_error": -0.1}, "max_error must be a finite number"),
        ({"audit_rows": 100, "min_recall": 1.0}, "min_recall=1.0 is dense attention, which no sample can show"),
        ({"audit_rows": 100, "max_error": 0}, "max_error=0 is dense attention"),
        ({"min_recall": 0.9}, "min_recall=0.9 needs audit_rows of at least 42: fewer rows cannot show it.*got 0"),
        ({"audit_rows": 400, "max_error": 0.1}, "max_error=0.1 needs audit_rows of at least 418"),
    ],
)
def test_bad_values_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        PrefillPolicy(**fields)


def test_short_prompts_are_dense_and_the_told_length_counts():
    policy = PrefillPolicy(min_seq_len=5000, crossover=False)
    assert why_dense(policy, 4999) == "short prompt"
    assert why_dense(policy, 5000) is None
    assert why_dense(policy, 400, told=[5000]) is None


def test_prompts_that_keep_much_are_dense():
    assert why_dense(PrefillPolicy(min_seq_len=0), 2000) == "no gain from sparsity"
    assert why_dense(PrefillPolicy(min_seq_len=0, crossover=False), 2000) is None
    assert why_dense(PrefillPolicy(), 32768) is None
    assert why_dense(PrefillPolicy(), 32768, backend=None) == "no gain from sparsity"


def test_layers():
    policy = PrefillPolicy(dense_layers=[0, -1], layer_budgets=[1, 3.0, 2.0])
    assert [policy.is_dense_layer(i, 3) for i in range(3)] == [True, False, True]
    config = StemConfig(budget_scale=0.5)
    assert policy.layer_config(config, 1, 3) == StemConfig(budget_scale=1.5)
    assert policy.layer_config(config, 1, 3) is policy.layer_config(config, 1, 3)
    assert PrefillPolicy(depth_decay=1.0).layer_config(config, 7, 8) is config
    with pytest.raises(ValueError, match="layer_budgets has 3 factors, none for layer 3"):
        policy.layer_config(config, 3, 4)
    policy.check_layers(3)
    with pytest.raises(ValueError, match="layer_budgets has 3 factors, and the model has 4 layers"):
        policy.check_layers(4)
    with pytest.raises(ValueError, match="are not all layers of a model with 4"):
        PrefillPolicy(dense_layers=(4,)).check_layers(4)


def test_budgets_fall_evenly_along_depth_around_the_same_mean():
    policy, config = PrefillPolicy(depth_decay=0.1), StemConfig(budget_scale=0.5)
    scales = [policy.layer_config(config, layer, 5).budget_scale for layer in range(5)]
    assert scales == pytest.approx([0.95, 0.725, 0.5, 0.275, 0.05])
    assert policy.layer_config(config, 0, 1) is config  # one layer has no depth
    everything = StemConfig(budget_ratio=1.0)
    assert policy.layer_config(everything, 4, 5) is everything
    tuned = PrefillPolicy(depth_decay=0.1, layer_budgets=(1.0, 3.0))  # what was found stands in its place
    assert tuned.layer_config(config, 1, 2).budget_scale == 1.5


def test_a_settings_file_gives_the_fields_it_names(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"block_size": 64, "layer_budgets": [1, 2], "min_seq_len": 100}')
    fields = read_settings(file)
    assert fields == {"block_size": 64, "layer_budgets": [1, 2], "min_seq_len": 100}
    config, policy = make_settings(fields, "official")
    assert config == StemConfig.preset("official", block_size=64)
    assert policy == PrefillPolicy.preset("official", min_seq_len=100, layer_budgets=(1.0, 2.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read settings file .*settings.json: No such file"),
        (b"{", "settings file .*settings.json must be a JSON object"),
        (b"[1]", "settings file .*settings.json must be a JSON object, got list"),
        (b'{"budget": 1}', "settings file .*settings.json: unknown setting budget; known: block_size"),
        (b'{"decay": 7}', "settings file .*settings.json: decay must be"),
        (b'{"min_seq_len": -1}', "settings file .*settings.json: min_seq_len must be"),
        (b"\xff\xfe", "cannot read settings file .*settings.json: not UTF-8"),
    ],
)
def test_a_wrong_settings_file_is_one_clear_error(tmp_path, content, message):
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_settings(file)
