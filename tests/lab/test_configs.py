import pytest

from stem_attn.config import PRESETS, StemConfig
from stem_attn.lab.configs import DEMO, plain_settings, settings_from_options
from stem_attn.lab.errors import InputError
from stem_attn.policy import PrefillPolicy, make_settings, read_settings


def test_a_file_and_changes_stand_in_their_order(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"block_size": 64, "decay": 0.5, "min_seq_len": 7}')
    config, policy = settings_from_options("paper", ["decay=0.6"], file)
    assert (config.block_size, config.decay, config.budget_floor, policy.min_seq_len) == (64, 0.6, 54, 7)
    assert read_settings(file) == {"block_size": 64, "decay": 0.5, "min_seq_len": 7}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_brings_its_policy(preset):
    assert settings_from_options(preset, []) == (StemConfig.preset(preset), PrefillPolicy.preset(preset))


def test_a_preset_of_a_commands_own_differs_from_the_default(tmp_path):
    config, policy = settings_from_options("demo", ["dense_layers=[0]"], own_presets={"demo": DEMO})
    assert (config, policy) == make_settings({**DEMO, "dense_layers": [0]})
    file = tmp_path / "settings.json"
    file.write_text('{"block_size": 32}')
    assert settings_from_options("demo", [], file, {"demo": DEMO})[0].block_size == 32
    with pytest.raises(InputError, match=r"unknown preset .fast.; known: demo, default, default-0.1, official, paper"):
        settings_from_options("fast", [], own_presets={"demo": DEMO})


def test_plain_settings_are_a_settings_file():
    config, policy = settings_from_options("official", ["layer_budgets=[1, 0.5]", "value_term=none"])
    assert make_settings(plain_settings(config, policy)) == (config, policy)
