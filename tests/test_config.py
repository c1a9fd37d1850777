import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from stem_attn import StemConfig
from stem_attn.config import PRESETS, field_names


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = StemConfig.preset(name, block_size=64, decay=0.5)
    assert StemConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())) == set(field_names())


def test_is_frozen_and_hashable():
    config = StemConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 64
    assert hash(config) == hash(StemConfig())


def test_one_ratio_is_a_single_step():
    assert StemConfig(budget_ratio=0.25).budget_ratio == ((None, 0.25),)
    config = StemConfig(budget_ratio=((10, 0.5), (20, 0.25), (None, 0.1)))
    assert [config.ratio(n) for n in (9, 10, 19, 20)] == [0.5, 0.25, 0.25, 0.1]


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({}, 11.0),
        ({"budget_scale": 0.0}, 0.0),
        ({"budget_bias": 10**400}, 1e300),
        ({"budget_scale": sys.float_info.max}, 1e300),
    ],
)
def test_where_budgets_decay_from(fields, blocks):
    config = StemConfig(**({"budget_ratio": 0.25, "budget_bias": 3, "budget_scale": 2.0} | fields))
    assert config.full_budget(10) == blocks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 24}, "multiple of 16"),
        ({"block_size": 256}, "from 16 to 128"),
        ({"block_size": 64.0}, "block_size must be an int"),
        ({"block_size": True}, "block_size must be an int"),
        ({"stride": 5}, "divide block_size"),
        ({"stride": 0}, "stride"),
        ({"value_term": "max"}, "one of none, log, zscore"),
        ({"value_weight": float("nan")}, "finite"),
        ({"value_weight": -1}, "value_weight"),
        ({"decay": 0.0}, "above 0"),
        ({"decay": 1.5}, "decay"),
        ({"decay": float("inf")}, "finite"),
        ({"budget_ratio": 2.0}, "budget_ratio"),
        ({"budget_ratio": ((10, 0.1),)}, "rising bounds"),
        ({"budget_ratio": ((20, 0.1), (10, 0.2), (None, 0.3))}, "rising bounds"),
        ({"budget_ratio": "most"}, "budget_ratio"),
        ({"budget_bias": -1}, "budget_bias"),
        ({"budget_floor": 0}, "budget_floor"),
        ({"tail_blocks": -1}, "tail_blocks"),
        ({"tail_ratio": 1.5}, "tail_ratio"),
        ({"local_blocks": 0}, "local_blocks"),
        ({"sink_blocks": -1}, "sink_blocks"),
        ({"sink_blocks": 1 << 31}, "sink_blocks must be an int from 0 to 1073741824"),
        ({"local_blocks": 10**400}, "local_blocks must be an int from 1 to 1073741824"),
        ({"value_weight": 1e308}, "value_weight"),
        ({"budget_scale": 10**400}, "budget_scale must be a finite number"),
        ({"decay": 10**400}, "decay must be a finite number"),
        ({"spread_weight": 1e39}, "spread_weight"),
        ({"decay_from": "middle"}, "decay_from"),
        ({"forced_blocks": "maybe"}, "forced_blocks"),
        ({"budget_scale": -0.5}, "budget_scale"),
        ({"no_such_field": 1}, "unknown config field no_such_field"),
        ({"min_seq_len": 0, "dense_layers": [0]}, "dense_layers, min_seq_len belong to an adapter's PrefillPolicy"),
    ],
)
def test_bad_values_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        StemConfig.preset("default", **fields)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"default, default-0.1, official, paper"):
        StemConfig.preset("fast")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_bad_json_is_one_clear_error(text):
    with pytest.raises(ValueError, match="JSON object"):
        StemConfig.from_json(text)


def test_pickling_keeps_equality_and_hash_in_another_process():
    program = (
        "import pickle, sys; c = pickle.load(sys.stdin.buffer); from stem_attn import StemConfig; "
        "print(c == StemConfig(decay=0.5), {StemConfig(decay=0.5): 1}.get(c))"
    )
    sent = pickle.dumps(StemConfig(decay=0.5))
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, check=True)
    assert done.stdout.split() == [b"True", b"1"]
