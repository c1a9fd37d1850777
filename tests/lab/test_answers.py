"""Answers of several readings together, and how likely a reading makes a given answer."""

import pytest
import torch

import hf_models
from stem_attn.lab.answers import decode, force, read_prompt, together


def answers(model, reads, new_tokens):
    return [row for batch in together(reads, new_tokens) for row in decode(model, batch, new_tokens)]


def expected_answer(model, ids, new_tokens):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])  # gemma3: half of the layers have a window
@pytest.mark.parametrize("length", [300, 512, 701])  # the window is 512
def test_answers_decoded_together_are_those_of_generate(model_type, length):
    model = hf_models.tiny_model(model_type)
    model.generation_config.eos_token_id = None
    prompts = [hf_models.tokens(1, length, seed=seed) for seed in range(3)]
    expected = [expected_answer(model, ids, 12) for ids in prompts]
    assert answers(model, [read_prompt(model, ids) for ids in prompts], 12) == expected
    assert answers(model, [read_prompt(model, prompts[0])], 12) == expected[:1]


def test_a_cache_of_another_kind_is_continued_alone():
    model = hf_models.tiny_model("llama")
    ids = hf_models.tokens(1, 100)

    class Other(type(read_prompt(model, ids).cache.layers[0])):
        pass

    reads = [read_prompt(model, ids) for _ in range(2)]
    for read in reads:
        for layer in read.cache.layers:
            layer.__class__ = Other
    alone = together(reads, 5)
    assert len(alone) == 2
    expected = answers(model, [read_prompt(model, ids)], 5)
    assert [decode(model, read, 5) for read in alone] == [expected] * 2
    assert decode(model, alone[0], 5) == expected  # the first time left the cache as it was


def test_an_answer_ends_with_its_end_token_and_the_others_go_on():
    model = hf_models.tiny_model("llama")
    model.generation_config.eos_token_id = None
    prompts = [hf_models.tokens(1, 100, seed=seed) for seed in range(3)]
    full = answers(model, [read_prompt(model, ids) for ids in prompts], 10)
    end = full[0][4]
    model.generation_config.eos_token_id = [end, 1]
    ends = {end, 1}
    cut = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), 10)] for row in full]
    assert answers(model, [read_prompt(model, ids) for ids in prompts], 10) == cut
    assert len(cut[0]) <= 5
    assert answers(model, [read_prompt(model, prompts[0])], 1) == [full[0][:1]]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("answer", [[7], [7, 30, 2, 9]])
def test_the_log_probability_is_that_of_one_forward_over_prompt_and_answer(model_type, answer):
    model = hf_models.tiny_model(model_type)
    prompts = [hf_models.tokens(1, 600, seed=seed) for seed in range(2)]
    (read,) = together([read_prompt(model, ids) for ids in prompts], 8)
    found = force(model, read, answer)
    for ids, forced in zip(prompts, found, strict=True):
        whole = torch.cat([ids, torch.tensor([answer])], 1)
        with torch.no_grad():
            rows = model(whole).logits[0, 599:-1].double().log_softmax(-1)
        expected = rows.gather(-1, torch.tensor(answer)[:, None]).mean()
        assert forced.log_probability == pytest.approx(float(expected), abs=1e-4)
        assert forced.own == (rows.argmax(-1).tolist() == answer)
    before = decode(model, read, 8)
    assert force(model, read, answer) == found
    assert decode(model, read, 8) == before


def test_an_answer_is_a_models_own_if_it_writes_it_by_itself():
    model = hf_models.tiny_model("llama")
    model.generation_config.eos_token_id = None
    prompts = [hf_models.tokens(1, 100, seed=seed) for seed in range(2)]
    (read,) = together([read_prompt(model, ids) for ids in prompts], 8)
    first, second = decode(model, read, 8)
    assert first != second
    assert [forced.own for forced in force(model, read, first)] == [True, False]
    assert [forced.own for forced in force(model, read, [*first[:-1], first[-1] ^ 1])] == [False, False]
