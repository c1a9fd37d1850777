import pytest

from stem_attn.lab.errors import InputError
from stem_attn.lab.named_methods import NamedMethod, known_methods, parse_methods


def test_methods_and_variants_are_read():
    named_methods = parse_methods(
        "uniform, mine,stem-default", ["mine=stem-official,budget_ratio=[[160, 0.2], [null, 0.1]],value_term=none"]
    )
    assert [named.name for named in named_methods] == ["uniform", "mine", "stem-default"]
    assert named_methods[1].fields == {"budget_ratio": [[160, 0.2], [None, 0.1]], "value_term": "none"}
    assert named_methods[1].build(64).config.value_term == "none"
    assert named_methods[1].build(64).block_size == 64
    assert "stem" not in known_methods()
    for name in known_methods():
        assert NamedMethod(name, name).build(32).block_size == 32
    with pytest.raises(InputError, match="unknown method 'stem'"):
        parse_methods("stem")


def test_uniform_is_the_official_method_without_its_decay():
    uniform = NamedMethod("uniform", "uniform").build(32)
    assert (uniform.config.value_term, uniform.config.forced_blocks) == ("zscore", "on_top")


def test_variants_from_a_file_that_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"cannot read settings file nowhere\.json"):
        parse_methods("", ["tuned=config:nowhere.json"])
