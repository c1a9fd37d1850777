"""The CUDA backend in a real engine on a GPU: where every block is kept, FLASH_ATTN's answers; sparse prefill live."""

import pytest
import torch
from engines import BLOCK, DECODE_GRAPHS, KEEP_ALL, SPARSE, differing, engine, reconfigure, sampling, set_chunk, stats
from tiny_families import prompt, save

from stem_attn.integrations.vllm.settings import CHOOSER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LAYERS = 2
PROMPTS = [prompt(n, seed) for seed, n in enumerate((1502, 33, 700, 64, 1025, 1, 512))]
PROMPT_TOKENS = sum(map(len, PROMPTS)) - 1  # the prompt of one token is a decode
OPTIONS = {"dtype": "bfloat16", "max_num_batched_tokens": 2048, "max_num_seqs": 16}
# A cache of a size, so that no engine measures what other programs leave it.
OPTIONS |= {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**30}
EXECUTION = {
    "eager": {},
    "graphs": DECODE_GRAPHS,
    "compiled": {"enforce_eager": False},
}


def answers(llm, prompts, salt=None, **changed):
    """Greedy tokens, and the log-probabilities of the likeliest at every place."""
    asked = [{"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})} for ids in prompts]
    made = [out.outputs[0] for out in llm.generate(asked, sampling(logprobs=5, **changed), use_tqdm=False)]
    return [(list(out.token_ids), out.logprobs) for out in made]


def scenario(llm):
    """Chunks, decodes and prompts of many lengths in the same steps; then a prompt behind a cached prefix."""
    set_chunk(llm, 300)
    return answers(llm, PROMPTS) + answers(llm, [PROMPTS[0][:1024] + prompt(500, 9)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"head_dim": 128, "num_hidden_layers": LAYERS}
    return save("llama", tmp_path_factory.mktemp("llama"), **sizes)


@pytest.fixture(scope="module")
def dense(folder):
    with engine(folder, attention_backend="FLASH_ATTN", **OPTIONS) as llm:
        return scenario(llm)


@pytest.fixture(scope="module", params=EXECUTION)
def llm(request, folder, dense):
    with engine(folder, KEEP_ALL, **{**OPTIONS, **EXECUTION[request.param]}) as llm:
        yield llm


def test_with_everything_kept_answers_are_flash_attentions(llm, dense, record_property):
    reconfigure(llm, KEEP_ALL)
    differ = differing(scenario(llm), dense)
    record_property("answers that differ, both tokens about as likely", f"{differ} of {len(dense)}")
    assert differ <= 2
    counts = stats(llm)
    # The last prompt finds its first 1024 tokens in the cache, and the last token of a prompt is never taken from it.
    assert counts["sparse_tokens"] == (PROMPT_TOKENS + 500) * LAYERS
    assert set(counts["dense_tokens"]) == {"decode"}
    assert counts["unknown_prompt_len_tokens"] == 0
    assert counts["density"] == 1


def test_sparse_prefill_is_live_and_the_same_in_any_chunks(llm):
    made = []
    for chunk in (5 * BLOCK, 2048):
        reconfigure(llm, SPARSE)
        set_chunk(llm, chunk)
        # One at a time: the decodes of others would shift the chunks off the blocks.
        made.append([answers(llm, [ids])[0] for ids in PROMPTS])
        counts = stats(llm)
        assert counts["sparse_tokens"] == PROMPT_TOKENS * LAYERS
        assert counts["unknown_prompt_len_tokens"] == 0
        assert counts["density"] < 0.6
    assert differing(*made) <= 2


def test_a_target_out_of_reach_has_flash_attentions_answers(llm, dense):
    reconfigure(llm, {**SPARSE, "audit_rows": 256, "min_recall": 0.95})
    assert differing(scenario(llm), dense) <= 2
    counts = stats(llm)
    sparse = PROMPT_TOKENS + 500
    assert counts["sparse_tokens"] == sparse * LAYERS
    assert counts["redone_tokens"] == dict.fromkeys(range(LAYERS), sparse)
    assert all(found["recall"][0] < 0.95 for found in counts["audit"].values())


def test_requests_that_ask_for_dense_attention_have_flash_attentions_answers(folder, dense):
    with engine(folder, SPARSE, logits_processors=[CHOOSER], **OPTIONS) as llm:
        set_chunk(llm, 300)
        answers(llm, PROMPTS)  # sparse pages of the same prompts
        llm.collective_rpc("stem_reset_stats")
        made = answers(llm, PROMPTS, salt="stem=dense", extra_args={"stem": "dense"})
        assert differing(made, dense[: len(PROMPTS)]) <= 2
        counts = stats(llm)
        assert counts["sparse_tokens"] == 0
        assert counts["dense_tokens"]["asked for"] == sum(map(len, PROMPTS)) * LAYERS


def test_an_fp8_cache_loses_what_it_loses_in_flash_attention(folder, dense, record_property):
    """Of the first tokens' log-probabilities, against FLASH_ATTN over a cache in bfloat16."""
    fp8 = {**OPTIONS, "kv_cache_dtype": "fp8"}
    with engine(folder, attention_backend="FLASH_ATTN", **fp8) as llm:
        set_chunk(llm, 300)
        theirs = answers(llm, PROMPTS)
    with engine(folder, KEEP_ALL, **fp8) as llm:
        set_chunk(llm, 300)
        ours = answers(llm, PROMPTS)
        counts = stats(llm)
        assert counts["sparse_tokens"] == PROMPT_TOKENS * LAYERS
        assert set(counts["dense_tokens"]) == {"decode"}
        reconfigure(llm, SPARSE)
        answers(llm, PROMPTS)
        assert stats(llm)["density"] < 0.6
        reconfigure(llm, {**KEEP_ALL, "precision": "fp8"})
        rounded = answers(llm, PROMPTS)
    assert any(one[0] != other[0] for (_, one), (_, other) in zip(ours, rounded, strict=True))
    lost = {}
    for name, made in (("FLASH_ATTN", theirs), ("STEM", ours), ("STEM, products in 8 bits", rounded)):
        pairs = [(got[0], exact[0]) for (_, got), (_, exact) in zip(made, dense, strict=False)]
        lost[name] = max(
            abs(got[token].logprob - exact[token].logprob)
            for got, exact in pairs
            for token in got.keys() & exact.keys()
        )
    record_property("log-probabilities with an fp8 cache off those with bfloat16", lost)
    assert max(lost["STEM"], lost["STEM, products in 8 bits"]) <= 2 * lost["FLASH_ATTN"]


def test_after_sleep_answers_are_those_of_before(folder):
    with engine(folder, SPARSE, enable_sleep_mode=True, **OPTIONS) as llm:
        set_chunk(llm, 5 * BLOCK)
        before = [answers(llm, [ids])[0] for ids in PROMPTS]
        llm.sleep(level=1)
        llm.wake_up()
        llm.reset_prefix_cache()
        assert [answers(llm, [ids])[0][0] for ids in PROMPTS] == [tokens for tokens, _ in before]
        assert stats(llm)["density"] < 0.6
