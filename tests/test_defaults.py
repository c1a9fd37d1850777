"""What a process sets by default changes no result, and nothing made under someone's context outlives it."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

import stem_attn
from helpers import SMALL, make_qkv
from stem_attn import BlockSelection, StemConfig, block_sparse_attention, methods, stem_attention
from stem_attn.methods import METHODS

CONFIGS = {
    "linear": SMALL,
    "zscore": dataclasses.replace(SMALL, value_term="zscore", forced_blocks="on_top"),
    "mass": StemConfig(block_size=16, budget_ratio=0.1, budget_bias=2),
    "residual": StemConfig(block_size=16, budget_ratio=0.1, budget_bias=2, residual="mean"),
}


@pytest.fixture(params=["meta device", "bfloat16", "float16", "meta context"])
def someones_defaults(request):
    if request.param == "meta context":
        with torch.device("meta"):
            yield
        return
    if request.param == "meta device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def inputs():
    q, k, v = make_qkv(213, 410, batch=2)
    band = BlockSelection.band(batch=2, heads=4, window=50, block_size=16, q_len=213, k_len=410, device="cpu")
    return q, k, v, band


@pytest.fixture(scope="module")
def expected(inputs):
    return outcomes(*inputs, bias=2)


def outcomes(q, k, v, band, bias):
    """Outputs and kept blocks of every config, and a band; another `bias` to miss every cache."""
    found = []
    for config in CONFIGS.values():
        config = dataclasses.replace(config, budget_bias=bias)
        out, selection = stem_attention(q, k, v, config=config, prompt_len=[410, 600], return_selection=True)
        found += [out, selection.indices, selection.counts]
    found.append(block_sparse_attention(q, k, v, band, window=50))
    return found


def test_functions(inputs, expected, someones_defaults):
    for bias in (2, 3):  # 3 is in no cache yet
        got = outcomes(*inputs, bias=bias)
        if bias == 2:
            for x, y in zip(got, expected, strict=True):
                assert x.device.type == "cpu"
                assert torch.equal(x, y)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"stem"}))
def test_methods(name, someones_defaults):
    torch_defaults = torch.get_default_dtype()
    fields = {} if name == "uniform" else {"block_size": 16}
    with torch.device("cpu"):
        q, k, v = make_qkv(300)
    got = methods.make(name, **fields).select(q, k, v).to_mask()
    assert got.device.type == "cpu"
    assert torch.get_default_dtype() == torch_defaults


def test_a_later_call_finds_nothing_of_it(inputs, expected):
    """After the tests above ran in whatever order."""
    for x, y in zip(outcomes(*inputs, bias=2), expected, strict=True):
        assert torch.equal(x, y)
    assert all(x.device.type == "cpu" for x in outcomes(*inputs, bias=3))


FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "linspace", "eye", "rand", "randn", "randint"}
CORE = [
    path
    for path in sorted(Path(stem_attn.__file__).parent.rglob("*.py"))
    if path.relative_to(Path(stem_attn.__file__).parent).parts[0] not in ("lab", "cli.py")
]


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(Path(stem_attn.__file__).parent)))
def test_every_allocation_names_its_device(path):
    for node in ast.walk(ast.parse(path.read_text())):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
        if call and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            given = {keyword.arg for keyword in node.keywords}
            assert "device" in given, f"{path.name}:{node.lineno}"
            whole = node.func.attr == "arange"  # of ints: int64 whatever the default
            assert whole or "dtype" in given, f"{path.name}:{node.lineno} has the default dtype"
