"""In the GPU kernels one non-finite number reaches what dense attention lets it reach, and nothing else."""

import pytest
import torch

from helpers import SMALL, make_qkv
from stem_attn import StemConfig, stem_attention
from stem_attn.blocks import BlockSelection

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZE = 16
# Tokens, heads, KV heads, the bad token. The interpreter is slow.
SHAPE = (200, 4, 2, 100) if GPU else (80, 2, 2, 40)
CONFIGS = {
    "linear": SMALL,
    "linear shared": StemConfig(block_size=SIZE, score="linear", budget_ratio=0.15, budget_bias=2, tail_blocks=0),
    "official": StemConfig.preset(
        "official", block_size=SIZE, budget_ratio=0.1, budget_bias=2, dense_below=0, sink_blocks=1, local_blocks=1
    ),
    "mass": StemConfig(block_size=SIZE, budget_ratio=0.15, budget_bias=2, tail_blocks=0),
    "mass head": StemConfig(block_size=SIZE, budget_ratio=0.15, budget_bias=2, tail_blocks=0, budget_scope="head"),
    "mass group": StemConfig(block_size=SIZE, budget_ratio=0.15, budget_bias=2, tail_blocks=1, budget_scope="group"),
}
IN_INTERPRETER = [
    ("linear shared", "q", "nan"),
    ("linear", "k", "nan"),
    ("mass", "k", "nan"),
    ("mass head", "k", "1e20"),
]


def skip_in_interpreter(*case):
    pytest.importorskip("triton")
    if not GPU and not any(case == told[: len(case)] for told in IN_INTERPRETER):
        pytest.skip("on GPUs only: the interpreter is slow")


def run(q, k, v, config):
    inputs = (x.to(DEVICE) for x in (q, k, v))
    out, selection = stem_attention(*inputs, config=config, backend="triton", return_selection=True)
    # Whatever the scores were, rows are what a selection promises.
    checked = BlockSelection(selection.indices, selection.counts, SIZE, selection.q_len, selection.k_len)
    return out.cpu(), checked.to_mask().cpu()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e20", "-1e30"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_number(name, where, value):
    skip_in_interpreter(name, where, value)
    config = CONFIGS[name]
    tokens, heads, kv_heads, token = SHAPE
    q, k, v = make_qkv(tokens, batch=2, heads=heads, kv_heads=kv_heads)
    before, kept_before = run(q, k, v, config)
    {"q": q, "k": k, "v": v}[where][0, -1, token, 5] = float(value)
    out, kept = run(q, k, v, config)

    assert torch.equal(out[1], before[1])  # the other batch row, bit for bit
    assert torch.equal(kept[1], kept_before[1])
    reached = torch.zeros(heads, tokens, dtype=torch.bool)  # (head, row) that dense attention may lose
    others = heads - 1 if where == "q" else heads - heads // kv_heads
    if where == "q":
        reached[-1, token] = True
    else:
        reached[others:, token // SIZE * SIZE :] = True  # a tile of the diagonal block may lose its earlier rows too
    assert out[0][~reached].isfinite().all()
    if config.budget_scope == "head":  # heads that share a budget may choose otherwise
        assert torch.equal(out[0, :others], before[0, :others])
        assert torch.equal(kept[0, :others], kept_before[0, :others])
    # The causal choice of earlier rows does not know what comes later.
    if config.value_term != "zscore":
        earlier = token // SIZE
        assert torch.equal(kept[0, :, :earlier], kept_before[0, :, :earlier])


@pytest.mark.parametrize("name", CONFIGS)
def test_forced_blocks_stay_and_the_cost_holds(name):
    skip_in_interpreter(name)
    config = CONFIGS[name]
    tokens, heads, kv_heads, token = SHAPE
    q, k, v = make_qkv(tokens, heads=heads, kv_heads=kv_heads)
    _, usual = run(q, k, v, config)
    k[0, 0, 10:token] = torch.nan
    q[0, -1] = torch.nan
    _, kept = run(q, k, v, config)
    rows = torch.arange(kept.shape[2])
    assert kept[0, :, rows, rows].all()
    assert kept[0, :, :, 0].all()  # a sink block everywhere
    if config.forced_blocks == "inside":
        assert torch.equal(kept.sum((1, 3)), usual.sum((1, 3)))
