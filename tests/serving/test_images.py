"""Images before text, in a tiny LLaVA: vLLM puts an image's tokens in the prompt, which is sparse as any other."""

import pytest
import torch
from engines import DENSE, KEEP_ALL, SPARSE, attention_layers, differing, engine, reconfigure, sampling, stats
from tiny_families import IMAGE_SIZE, IMAGE_TOKEN, PATCH_SIZE, prompt, save_llava

pytestmark = pytest.mark.slow

pytest.importorskip("torchvision", reason="without torchvision vLLM reads no images", exc_type=ImportError)

IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
LAYERS = 2
ON_GPU = torch.cuda.is_available()
OPTIONS = {"skip_tokenizer_init": False, "max_num_batched_tokens": 1024, "limit_mm_per_prompt": {"image": 2}}
OPTIONS |= {"dtype": "bfloat16", "kv_cache_memory_bytes": 2**30} if ON_GPU else {}


def ask(llm, images):
    """Greedy tokens: some prompts with an image before the text, some without."""
    from PIL import Image

    random = torch.Generator().manual_seed(3)
    asked = []
    for n, tokens in enumerate((700, 33, 500)):
        text = [token for token in prompt(tokens, n) if token != IMAGE_TOKEN]
        if n < images:
            pixels = torch.randint(256, (40, 60, 3), generator=random, dtype=torch.uint8)
            image = Image.fromarray(pixels.numpy())
            asked.append({"prompt_token_ids": [IMAGE_TOKEN, *text], "multi_modal_data": {"image": image}})
        else:
            asked.append({"prompt_token_ids": text})
    made = llm.generate(asked, sampling(logprobs=5), use_tqdm=False)
    answers = [(list(out.outputs[0].token_ids), out.outputs[0].logprobs) for out in made]
    return [len(out.prompt_token_ids) for out in made], answers


def test_images_before_text(tmp_path, record_property):
    folder = save_llava(tmp_path)
    with engine(folder, KEEP_ALL, **OPTIONS) as llm:
        lengths, kept = ask(llm, images=2)
        assert lengths[0] > 600 + IMAGE_TOKENS
        counts = stats(llm)
        language = [name for name in attention_layers(llm) if "vision" not in name]
        assert len(language) == LAYERS
        assert counts["sparse_tokens"] == sum(lengths) * LAYERS
        assert set(counts["dense_tokens"]) == {"decode"}
        reconfigure(llm, SPARSE)
        _, sparse = ask(llm, images=2)
        assert stats(llm)["density"] < 0.6
        reconfigure(llm, DENSE)
        dense = ask(llm, images=2)[1]
        differ = differing(kept, dense)
        record_property("answers that differ, both tokens about as likely", f"{differ} of {len(dense)}")
        assert differ <= (1 if ON_GPU else 0)  # bfloat16 turns ties round
        assert any(one[0] != other[0] for one, other in zip(sparse, dense, strict=True))
        without = ask(llm, images=0)[1]  # otherwise nobody looked at the images
        assert without[0][0] != dense[0][0]
        assert without[1][0] != dense[1][0]
