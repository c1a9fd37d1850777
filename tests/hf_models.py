"""Tiny random-weight models of the families that the Hugging Face adapter is checked on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stem_attn import PrefillPolicy, StemConfig
from stem_attn.integrations import hf
from stem_attn.policy import policy_field_names

BLOCK = 16
VOCAB = 128

# Everything kept: sparse must then equal dense.
KEEP_ALL = StemConfig(block_size=BLOCK, stride=4, budget_ratio=1.0, decay=1.0)
# Really sparse, about half of the blocks at 200 tokens.
SPARSE = StemConfig(block_size=BLOCK, stride=4, budget_ratio=0.2, budget_bias=1, tail_blocks=0)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# What a family needs beside the common sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _MOE,
    "qwen3_next": {
        **_MOE,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4},
    "gemma": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    "phi3": {},
    "glm4": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "head_dim": 8,  # read by the rotary embedding only
        "num_key_value_heads": 4,
    },
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "olmo": {},
    "granite": {},
    "smollm3": {},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 512,
    },
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return a small config of a model type."""
    return AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES.get(model_type, {}), **overrides})


def tiny_model(model_type: str, attn_implementation: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """Return a small model with random weights, the same ones on every call, in evaluation mode."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **overrides)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def enable(model: PreTrainedModel, config: StemConfig, **options: Any) -> PreTrainedModel:
    """Enable Stem at any length and whether or not it is faster; fields of the policy may be given too."""
    policy = {name: options.pop(name) for name in policy_field_names() if name in options}
    policy = PrefillPolicy(**{"min_seq_len": 0, "crossover": False, "depth_decay": 1.0, **policy})
    return hf.enable(model, config, policy=policy, **options)


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|."""
    return float((actual - expected).norm() / expected.norm())


def skip_where_models_cannot_be_traced():
    """Skip where this PyTorch cannot trace this transformers' own models in one graph, as 2.6 cannot trace 5.17's."""
    if not _models_can_be_traced():
        pytest.skip("this PyTorch cannot trace this transformers' models")


@functools.cache
def _models_can_be_traced():
    try:
        with torch.no_grad():
            torch.compile(tiny_model("llama"), backend="eager", fullgraph=True)(tokens(1, 20))
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True
