"""Methods with the default's tail."""

import json

import pytest
import torch

from stem_attn.api import select_blocks
from stem_attn.config import StemConfig
from stem_attn.lab.equal_density import select_at_density
from stem_attn.lab.errors import InputError
from stem_attn.lab.named_methods import parse_methods
from stem_attn.lab.tail import WithTail, tail_fields
from stem_attn.methods.knob import match_density

TOKENS, BLOCK = 4101, 32  # 129 blocks, the last one partial; long enough for the default to be sparse


@pytest.fixture(scope="module")
def qkv():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, TOKENS, 16, generator=generator) for heads in (4, 2, 2))


def mask(text, qkv, density=None):
    (named,) = parse_methods(text) if "," not in text else parse_methods("", [text])
    return select_at_density(named, BLOCK, density, *qkv, None)[0].selection.to_mask()


@pytest.mark.parametrize("name", ["xattention", "flashprefill", "minference", "uniform"])
def test_the_last_rows_are_the_defaults_and_the_others_the_methods(name, qkv):
    tail = StemConfig().tail_blocks
    assert tail > 0
    with_tail, own = mask(f"{name}+tail", qkv), mask(name, qkv)
    default = select_blocks(*qkv, config=StemConfig(block_size=BLOCK)).to_mask()
    torch.testing.assert_close(with_tail[:, :, :-tail], own[:, :, :-tail])
    torch.testing.assert_close(with_tail[:, :, -tail:], default[:, :, -tail:])
    assert torch.equal(with_tail, own) == torch.equal(own[:, :, -tail:], default[:, :, -tail:])


def test_stem_presets_take_the_fields(qkv):
    (named,) = parse_methods("stem-official+tail")
    config = named.build(BLOCK).config
    assert {name: getattr(config, name) for name in tail_fields()} == tail_fields()
    assert config.decay == StemConfig.preset("official").decay
    assert set(tail_fields()) >= {"tail_blocks", "tail_ratio"}


def test_a_density_counts_the_tail(qkv):
    method = parse_methods("xattention+tail")[0].build(BLOCK)
    matched = match_density(method, *qkv, 0.4, tolerance=0.0002)
    assert isinstance(matched, WithTail)
    selection = matched.select(*qkv)
    assert selection.density() == pytest.approx(0.4, abs=0.01)
    tail = StemConfig().tail_blocks
    alone = select_blocks(*qkv, config=StemConfig(block_size=BLOCK)).to_mask()
    assert torch.equal(selection.to_mask()[:, :, -tail:], alone[:, :, -tail:])
    kept = mask("xattention+tail", qkv, density=0.4)
    assert kept.sum() == selection.counts.sum()


def test_a_variant_may_have_the_tail(qkv):
    few = mask("few=xattention+tail,threshold=0.2", qkv)
    assert few.sum() < mask("xattention+tail", qkv).sum()
    with pytest.raises(InputError, match="few"):
        parse_methods("", ["few=xattention+tail,threshold=7"])[0].build(BLOCK)


def test_a_prompt_shorter_than_the_tail_is_the_defaults(qkv):
    short = tuple(tensor[:, :, :40] for tensor in qkv)
    default = select_blocks(*short, config=StemConfig(block_size=BLOCK)).to_mask()
    assert torch.equal(mask("xattention+tail", short), default)


def test_dense_has_no_tail_and_names_are_known():
    with pytest.raises(InputError, match="dense attention keeps everything, its tail too"):
        parse_methods("dense+tail")
    with pytest.raises(InputError, match=r"unknown method 'flash\+tail'; known: .* each but dense also with \+tail"):
        parse_methods("flash+tail")
    assert json.loads(json.dumps(parse_methods("xattention+tail")[0].describe()))["tail"] is True
