"""Every kind of causal language model of transformers that builds tiny: it matches its own dense attention."""

import inspect
import logging

import pytest
import torch
from test_hf_families import KINDS, LENGTH, run
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_models import COMMON, FAMILIES, KEEP_ALL, enable, relative_error, tokens
from stem_attn.integrations import hf

pytestmark = pytest.mark.slow

MODEL_TYPES = """
afmoe apertus arcee aria_text axk1 bailing_hybrid bamba bart beam bert bert-generation biogpt bitnet blenderbot
blenderbot-small camembert cohere cohere2 cohere2_moe ctrl cwm data2vec-text deepseek_v2 deepseek_v3 diffllama doge
dots1 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text
gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss
granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2
lfm2_moe lfm3 llama llama4_text longcat_flash marian mbart mellum mimo_v2_flash minicpm3 minimax minimax_m2
minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat nemotron nemotron_h olmo olmo2
olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
qwen3_moe qwen3_next recurrent_gemma roberta roberta-prelayernorm roc_bert seed_oss smollm3 solar_open stablelm
starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl youtu zaya
""".split()  # noqa: SIM905

# Types none of whose calls can be sparse: special arguments, their own masks, or an encoder that is not told to decode.
NEVER_SPARSE = {
    "doge": "4-D mask",
    "inkling_text": "position bias",
    **dict.fromkeys((n for n in MODEL_TYPES if "bert" in n and n != "modernbert-decoder"), "not causal"),
    **dict.fromkeys(("data2vec-text", "electra", "ernie"), "not causal"),
}

# A second part of several tokens fails without us too.
NO_PREFIX = ("recurrent_gemma",)

# Small sizes under the names that the configs use; each config takes those it knows.
SIZES = {
    **dict.fromkeys(("n_embd", "d_model"), 64),
    **dict.fromkeys(("n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("n_head", "num_heads", "n_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("ffn_dim", "n_inner", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_groups", "num_key_value_groups", "n_groups"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "n_positions": 1024,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "mamba_expand": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "sliding_window": 40,
}
SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_chunk_size": 32},
    "gemma3n_text": SHARED_KV,
    "gemma4_text": {**SHARED_KV, "global_head_dim": 32, "num_global_key_value_heads": 2},
    "gemma4_unified_text": {**SHARED_KV, "global_head_dim": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "n_routed_experts": 4, "zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"sliding_window": None},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 40,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type):
    """A small config whose layers are one of each type the model has."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()

    def settable(name):
        return not isinstance(inspect.getattr_static(kind, kind.attribute_map.get(name, name), None), property)

    def known(name):
        return name in kind.attribute_map or any(
            name in vars(k) or name in getattr(k, "__annotations__", ()) for k in kind.__mro__
        )

    fields = {name: value for name, value in {**COMMON, **SIZES}.items() if known(name) and settable(name)}
    if known("kv_lora_rank"):  # latent attention: no grouped heads, and head_dim is that of the rotary embedding
        fields["num_key_value_heads"] = 4
        if known("head_dim"):
            fields["head_dim"] = 8
    layer_types = getattr(default, "layer_types", None) if settable("layer_types") else None
    if layer_types:
        kinds = list(dict.fromkeys(layer_types))
        fields["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return kind(**{**fields, **FAMILIES.get(model_type, {}), **SPECIAL.get(model_type, {})})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_everything_kept_equals_dense(model_type, caplog):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    caplog.set_level(logging.ERROR)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(small_config(model_type)).eval(), tokens(2, LENGTH)
    assert sum(p.numel() for p in model.parameters()) < 20e6
    expected = {kind: run(model, ids, kind) for kind in KINDS if not (kind == "prefix" and model_type in NO_PREFIX)}
    cuts_masks = model_type == "doge" and "allow_is_causal_skip=False" not in inspect.getsource(
        inspect.getmodule(model)
    )
    if cuts_masks:  # in transformers 5.17
        with pytest.raises(ValueError, match="its attention computes with masks"):
            enable(model, KEEP_ALL)
        return
    enable(model, KEEP_ALL)
    for kind in expected:
        hf.reset_stats(model)
        error = relative_error(run(model, ids, kind), expected[kind])
        assert error < 1e-4, (kind, error)
        stats = hf.stats(model)
        if model_type in NEVER_SPARSE:
            assert stats.dense == {NEVER_SPARSE[model_type]: stats.calls}
        else:
            assert stats.sparse + stats.banded > 0, (kind, stats)
