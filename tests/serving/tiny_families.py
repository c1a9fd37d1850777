"""Tiny random models in folders that vLLM loads, and their greedy answers by transformers alone."""

import json

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 512
IMAGE_TOKEN = VOCAB - 2
IMAGE_SIZE, PATCH_SIZE = 224, 14  # pixels; a token a patch
WINDOW = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,  # logits that differ enough to compare
    "bos_token_id": None,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "gemma2": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 256,
        "no_rope_layers": [1, 0],
        "moe_layers": [],
        "intermediate_size_mlp": 192,
        "num_local_experts": 4,
    },
    "qwen3_next": {  # gated attention, heads that vLLM calls wide, and a linear layer
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 256,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
}


def save(family, folder, **changed):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changed})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    _save_words(folder)
    return str(folder)


def save_llava(folder):
    """Write a tiny LLaVA; its processor of images wants torchvision."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 64,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=AutoConfig.for_model("llama", **_COMMON),
        image_token_index=IMAGE_TOKEN,
    )
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    file = folder / "model.safetensors"
    tower = "vision_tower."
    weights = {name.replace(tower, f"{tower}vision_model."): x for name, x in load_file(file).items()}  # vLLM's names
    save_file(weights, file, metadata={"format": "pt"})
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    word = f"w{IMAGE_TOKEN}"
    tokenizer = _save_words(folder, additional_special_tokens=[word])
    made = LlavaProcessor(images, tokenizer, PATCH_SIZE, "default", image_token=word, num_additional_image_tokens=1)
    made.save_pretrained(folder)
    return str(folder)


def _save_words(folder, **options):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{VOCAB - 1}", **options)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_lora(folder, hidden=128, rank=4):
    """Write an adapter of the query projections of a tiny model's two layers, with random weights."""
    random = torch.Generator().manual_seed(1)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            *shape, generator=random
        )
        for layer in range(2)
        for side, shape in (("A", (rank, hidden)), ("B", (hidden, rank)))
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def save_eagle(folder):
    """Write a draft head for the tiny Llama, as EAGLE's: a layer without its first norm, behind a random projection."""
    save("llama", folder, num_hidden_layers=1)
    file = folder / "model.safetensors"
    weights = load_file(file)
    kept = [name for name in weights if "layers.0" in name and "input_layernorm" not in name]
    head = {name.removeprefix("model."): weights[name] for name in (*kept, "model.embed_tokens.weight")}
    hidden = _COMMON["hidden_size"]
    head["fc.weight"] = 0.05 * torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(2))
    save_file(head, file, metadata={"format": "pt"})
    return str(folder)


def prompt(tokens, seed):
    """Random tokens, the end token not among them."""
    return torch.randint(VOCAB - 1, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def greedy(folder, prompts, new_tokens):
    """What transformers answers, dense, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for ids in prompts:
        cache, step, new = None, torch.tensor([ids]), []
        while len(new) < new_tokens:  # not generate(), which would stop at the end token
            out = model(step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            new.append(int(step))
        answers.append(new)
    return answers
