"""Which models are refused: told by their code, so that the answer is right for every version of transformers."""

import inspect
import sys

import pytest
import torch
from test_hf_enable import untouched
from test_hf_families import KINDS, LENGTH, run
from transformers import AutoConfig, AutoModelForCausalLM

from hf_models import COMMON, FAMILIES, KEEP_ALL, enable, relative_error, tiny_config, tokens
from stem_attn.integrations import hf

REASONS = {
    "bloom": "attention interface",
    "gptj": "attention interface",
    "falcon": "attention interface",
    "xglm": "attention interface",
    "mpt": "attention interface",
    "mamba": "no attention layers",
    "gpt_neo": "attention interface",
    "bigbird_pegasus": "does not support SDPA",
    "deepseek_v32": "indexer",
    "deepseek_v4": "does not support SDPA",
}
SIZES = {  # of those that do not take the common ones
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128},
    "bigbird_pegasus": {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 128},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 128, "n_positions": 1024},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128},
    "deepseek_v32": {**COMMON, **FAMILIES["deepseek_v3"], "index_head_dim": 16, "index_n_heads": 2, "index_topk": 32},
    "deepseek_v4": {**COMMON, "index_head_dim": 16, "index_n_heads": 2, "n_routed_experts": 4},
}


@pytest.mark.parametrize("family", REASONS)
@torch.no_grad()
def test_a_model_is_refused_with_the_reason_or_right(family):
    config = AutoConfig.for_model(family, **SIZES[family]) if family in SIZES else tiny_config(family)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(2, LENGTH)
    routed = "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(sys.modules[type(model).__module__])
    if REASONS[family] == "attention interface" and routed:  # by this version of transformers
        expected = {kind: run(model, ids, kind) for kind in KINDS}
        enable(model, KEEP_ALL)
        for kind in KINDS:
            assert relative_error(run(model, ids, kind), expected[kind]) < 1e-4
        assert hf.stats(model).sparse > 0
        return
    with pytest.raises(ValueError, match=REASONS[family]):
        hf.enable(model)
    assert untouched(model)
    with pytest.raises(ValueError, match="not enabled"):
        hf.stats(model)
