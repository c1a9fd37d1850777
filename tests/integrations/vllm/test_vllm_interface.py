"""What the plugin uses of vLLM, against what wheels have of it: `interface/VERSION.json`, made by `interface.py`."""

import copy
import json
import zipfile
from pathlib import Path

import pytest

from stem_attn.integrations.vllm.interface import PARTS, missing, read_offer

EXTRACTS = sorted(Path(__file__).with_name("interface").glob("*.json"))
NEWEST = json.loads(EXTRACTS[-1].read_text())
FLASH = "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl"
COMMON = "vllm.v1.attention.backend:CommonAttentionMetadata"
# The newest version has both places, and either is enough.
EITHER = {(COMMON, "req_idx"), ("vllm.v1.worker.gpu.input_batch:InputBatch", "idx_mapping_np")}


@pytest.mark.parametrize("extract", EXTRACTS, ids=lambda path: path.stem)
def test_a_version_has_what_is_used(extract):
    assert missing(json.loads(extract.read_text())) == []


def test_whatever_is_taken_away_is_named():
    for owner, members in NEWEST.items():
        for member in members:
            left = {name: what for name, what in members.items() if name != member}
            reported = missing({**NEWEST, owner: left})
            if (owner, member) in EITHER:
                assert reported == []
            else:
                (line,) = reported
                assert f"{owner.rstrip(':')}.{member} is gone" in line
    without = {owner: members for owner, members in NEWEST.items() if owner != FLASH}
    assert missing(without) == [f"{FLASH} is gone"]


def test_of_two_places_one_is_enough():
    changed = copy.deepcopy(NEWEST)
    del changed[COMMON]["req_idx"], changed["vllm.v1.worker.gpu.input_batch:InputBatch"]["idx_mapping_np"]
    assert missing(changed) == [
        f"{COMMON}.req_idx is gone and vllm.v1.worker.gpu.input_batch:InputBatch.idx_mapping_np is gone"
    ]


def test_a_method_that_is_overridden_must_take_the_same_and_one_that_is_called_what_it_is_given():
    changed = copy.deepcopy(NEWEST)
    changed[FLASH]["forward"].append("sparsity")
    (line,) = missing(changed)
    assert line.startswith(f"{FLASH}.forward takes (layer, query, ")
    assert ", output_block_scale, sparsity), not (layer, " in line
    changed = copy.deepcopy(NEWEST)
    registry = changed["vllm.v1.attention.backends.registry:"]
    registry["register_backend"].append("anything")
    assert missing(changed) == []
    registry["register_backend"].remove("class_path")
    assert missing(changed) == ["vllm.v1.attention.backends.registry.register_backend takes no class_path"]


def test_only_the_asked_parts_are_looked_at():
    assert PARTS == ("everywhere", "cuda", "cpu", "V1 runner", "V2 runner", "requests")
    changed = {owner: members for owner, members in NEWEST.items() if owner != FLASH}
    assert missing(changed, ("everywhere", "cpu", "V1 runner", "V2 runner")) == []
    assert missing(changed, ("cuda",)) == [f"{FLASH} is gone"]


SOURCES = {
    "vllm/v1/attention/backends/flash_attn.py": """
class FlashAttentionImpl(Parent):
    isa: str
    def __init__(self, num_heads, *, head_size=1):
        self.here, other.there = 1, 2
    @property
    def block_table(self): ...
    @classmethod
    def get_name(cls): ...
    def forward(self, layer, /, *rest, output=None, **more): ...
""",
    "vllm/model_executor/layers/attention/attention.py": """
def set_default_quant_scales(layer, register_buffer=False):
    if register_buffer:
        layer.register_buffer("_k_scale", 1.0)
""",
    "vllm/config/__init__.py": """
try:
    from somewhere import get_layers_from_vllm_config
except ImportError:
    def get_current_vllm_config(): ...
""",
}


def test_sources_are_read_from_a_folder_and_from_a_wheel(tmp_path):
    for name, text in SOURCES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in SOURCES.items():
            archive.writestr(name, text)
    offer = read_offer(tmp_path)
    assert offer == {
        FLASH: {"__init__": ["num_heads", "head_size"], "forward": ["layer", "*rest", "output", "**more"]},
        "vllm.model_executor.layers.attention.attention:": {"_k_scale": None},
        "vllm.config:": {"get_layers_from_vllm_config": None, "get_current_vllm_config": []},
    }
    assert read_offer(zipfile.Path(wheel)) == offer
    assert read_offer(tmp_path, ("cpu",)) == {}
