import tiny_model
from stem_attn.lab.texts import DOCUMENTS, excerpts


def test_excerpts_do_not_overlap_and_come_from_every_document():
    tokenizer = tiny_model.tokenizer()
    found = excerpts(tokenizer, 1000, 7)
    texts = [document() for document in DOCUMENTS]
    assert [one.source for one in found[:3]] == [source for _, source in texts] == [one.source for one in found[3:6]]
    for one, later in zip(found, found[3:], strict=False):
        assert one.first_character + one.characters == later.first_character
    text, _ = texts[0]
    assert tokenizer.decode(found[3].ids[0]) == text[found[3].first_character :][: found[3].characters]
    assert {one.ids.shape for one in found} == {(1, 1000)}


def test_excerpts_begin_as_the_model_wants_its_texts_to(tmp_path):
    tokenizer = tiny_model.tokenizer()
    plain = tokenizer.__class__.__call__
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)

    class Opening(tokenizer.__class__):
        def __call__(self, text, add_special_tokens=True, **kwargs):
            encoded = plain(self, text, **kwargs)
            if add_special_tokens:
                encoded["input_ids"] = [256, *encoded["input_ids"]]
            return encoded

    tokenizer.__class__ = Opening
    first, second = excerpts(tokenizer, 100, 2, [text])
    assert first.ids[0, 0] == second.ids[0, 0] == 256
    assert (first.characters, second.first_character) == (99, 99)
