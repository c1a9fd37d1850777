import pytest

import tiny_model
from stem_attn.lab.errors import InputError
from stem_attn.lab.prompts import build_prompt, make_needle, public_text


def test_public_text_is_long_and_plain():
    text, name = public_text()
    assert len(text) > 200_000
    assert "Python" in name
    assert "compound statement" in text


def test_needle_follows_from_the_seed_and_is_new_to_the_text():
    text, _ = public_text()
    needle = make_needle(text, 3)
    assert make_needle(text, 3) == needle
    assert make_needle(text, 4) != needle
    assert needle.answer in needle.sentence
    assert needle.answer not in needle.question
    assert needle.answer not in text
    assert make_needle(f"{text} {needle.answer}", 3).answer != needle.answer


@pytest.mark.parametrize("max_tokens", [300, 1000, 1999])
def test_embedded_prompt_fits_and_holds_its_needle(max_tokens):
    tokenizer = tiny_model.tokenizer()
    text, source = public_text()
    needle = make_needle(text, 0)
    prompt = build_prompt(tokenizer, text, source=source, needle=needle, max_tokens=max_tokens)
    assert max_tokens - 16 <= prompt.tokens <= max_tokens
    assert prompt.cut
    said = tokenizer.decode(prompt.ids[0])
    assert said.count(needle.answer) == 1
    assert said.index(needle.sentence) < said.index(needle.question)
    assert prompt.question == needle.question


def test_own_text_is_whole_unless_cut():
    tokenizer = tiny_model.tokenizer()
    prompt = build_prompt(tokenizer, "abc " * 50, source="mine", question="Why?")
    assert tokenizer.decode(prompt.ids[0]) == "abc " * 50 + "\n\nWhy?\n"
    assert not prompt.cut
    cut = build_prompt(tokenizer, "abc " * 50, source="mine", question="Why?", max_tokens=100)
    assert cut.tokens <= 100
    assert cut.cut
    assert tokenizer.decode(cut.ids[0]).endswith("\n\nWhy?\n")


def test_chat_template_is_used():
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    prompt = build_prompt(tokenizer, "text", source="mine", question="Why?")
    assert tokenizer.decode(prompt.ids[0]) == "[user]text\n\nWhy?[assistant]"


def test_no_room_for_text_is_an_error():
    with pytest.raises(InputError, match="--max-tokens 10 leaves no room"):
        build_prompt(tiny_model.tokenizer(), "text", source="mine", question="Why though?", max_tokens=10)
