from stem_attn.config import PRESETS, read_fields
from stem_attn.lab.configs import config_from_options


def test_a_file_and_overrides_stand_in_their_order(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"block_size": 64, "decay": 0.5}')
    config = config_from_options("mine", ["decay=0.6"], file, {"mine": {**PRESETS["paper"], "stride": 2}})
    assert (config.block_size, config.decay, config.stride, config.budget_floor) == (64, 0.6, 2, 54)
    assert read_fields(file) == {"block_size": 64, "decay": 0.5}
