import pytest

from stem_attn.lab.ruler.scoring import clean, score
from stem_attn.lab.ruler.summary import summarize


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


def record(method, index, points, task="vt", length=4096, budget=0.25):
    names = ("method", "index", "score", "task", "length", "budget", "prompt_tokens")
    return dict(zip(names, (method, index, points, task, length, budget, length - 10), strict=True))


def test_differences_are_paired_and_cells_weigh_the_same():
    dense, sparse = [100, 80, 60, 40], [100, 60, 60, 20]
    records = [record("dense", i, points, budget=1.0) for i, points in enumerate(dense)]
    # In another order than dense: pairs go by index.
    records += [record("s", i, points) for i, points in reversed(list(enumerate(sparse)))]
    records += [record("dense", i, 50, task="fwe", budget=1.0) for i in range(2)]
    records += [record("s", i, 50, task="fwe", budget=0.15) for i in range(2)]
    found = summarize(records, ["dense", "s"])

    cell = found["cells"][1]
    assert (cell["task"], cell["method"], cell["samples"], cell["score"]) == ("vt", "s", 4, 60)
    assert cell["minus_dense"] == -10
    # Differences 0, -20, 0, -20: standard deviation 20 / sqrt(3), divided by sqrt(4).
    error = 20 / 3**0.5 / 2
    assert cell["interval"] == pytest.approx([-10 - 1.959964 * error, -10 + 1.959964 * error])
    dense_all, sparse_all = found["methods"]
    assert dense_all["minus_dense"] is None
    assert sparse_all["average"] == 55
    assert sparse_all["by_length"] == {4096: 55}
    assert sparse_all["budget"] == pytest.approx(0.2)
    assert sparse_all["minus_dense"] == -5
    assert sparse_all["standard_error"] == pytest.approx(error / 2)


def test_there_is_no_difference_without_dense_and_no_interval_of_one_sample():
    alone = summarize([record("s", 0, 50)], ["s"])["cells"][0]
    assert (alone["minus_dense"], alone["interval"]) == (None, None)
    both = summarize([record("dense", 0, 100), record("s", 0, 50)], ["dense", "s"])
    assert (both["cells"][1]["minus_dense"], both["methods"][1]["interval"]) == (-50, None)


def test_a_method_that_left_a_length_out_has_no_average():
    records = [record("dense", i, 100, length=length) for i in range(2) for length in (4096, 8192)]
    records += [record("s", i, 50) for i in range(2)]
    found = summarize(records, ["dense", "s"])
    assert [cell["method"] for cell in found["cells"]] == ["dense", "s", "dense"]
    sparse = found["methods"][1]
    assert sparse["by_length"] == {4096: 50, 8192: None}
    assert (sparse["average"], sparse["minus_dense"], sparse["interval"]) == (None, None, None)
