import pytest

from stem_attn.lab.tasks.ruler.scoring import clean, score


@pytest.mark.parametrize(
    ("answer", "references", "points"),
    [
        ("7312345", ["7312345"], 100),
        (": 7312345.\nThe end", ["7312345"], 100),
        ("731234", ["7312345"], 0),
        ("", ["7312345"], 0),
        ("abcde and FGHIJ", ["ABCDE", "fghij", "KLMNO", "PQRST"], 50),
        ("1. Ox 2. band 3. oxygen", ["ox", "band", "fries"], pytest.approx(200 / 3)),
        ("a\x00b", ["a\nb"], 100),  # control characters become line ends
        ("\x07 ox \x07", ["ox"], 100),
        ("STRASSE", ["straße"], 0),  # lower case, not case folding
    ],
)
def test_the_score_is_the_share_of_references_found(answer, references, points):
    assert score(answer, references) == points


def test_answers_are_stripped_of_control_characters_at_their_ends():
    assert clean("\x01\t a\tb \x02") == "a\nb"
