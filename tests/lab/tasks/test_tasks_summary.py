import pytest

from stem_attn.lab.tasks.summary import summarize

COMMON = {
    "model": "m", "weights": "w", "dtype": "float32", "seed": 1, "machine": "here", "chat": True, "sources": [],
    "layers": {"sparse": 2}, "prompt_tokens": 4000, "key": {"method": {"base": "dense"}},
}  # fmt: skip


def record(method, index, points, task="vt", length=4096, budget=0.25, answer="a", likely=-0.5):
    return {
        **COMMON, "method": method, "index": index, "score": points, "task": task, "length": length, "budget": budget,
        "answer": answer, "dense_answer_log_probability": likely, "exact_match": points,
    }  # fmt: skip


def test_comparisons_are_paired_and_cells_weigh_the_same():
    dense, sparse = [100, 80, 60, 40], [100, 60, 60, 20]
    records = [record("dense", i, points, budget=1.0, answer=str(i)) for i, points in enumerate(dense)]
    # In another order than dense: pairs go by index.
    records += [
        record("s", i, points, answer=str(i % 2), likely=-0.5 - 0.1 * i)
        for i, points in reversed(list(enumerate(sparse)))
    ]
    records += [record("dense", i, 50, task="fwe", budget=1.0) for i in range(2)]
    records += [record("s", i, 50, task="fwe", budget=0.15) for i in range(2)]
    found = summarize(records)

    cell = found["cells"][1]
    assert (cell["task"], cell["method"], cell["samples"], cell["score"]) == ("vt", "s", 4, 60)
    # Differences 0, -20, 0, -20: standard deviation 20 / sqrt(3), divided by sqrt(4).
    error = 20 / 3**0.5 / 2
    assert cell["minus_dense"]["mean"] == -10
    assert cell["minus_dense"]["interval"] == pytest.approx([-10 - 1.959964 * error, -10 + 1.959964 * error])
    assert cell["agreement"]["mean"] == 50
    assert cell["drift"]["mean"] == pytest.approx(0.15)
    # 0, .1, .2, .3: variance .05 / 3.
    assert cell["drift"]["standard_error"] == pytest.approx((0.05 / 3 / 4) ** 0.5)
    dense_all, sparse_all = found["means"]
    assert (dense_all["family"], dense_all["tasks"], dense_all["minus_dense"]) == ("RULER", 2, None)
    assert sparse_all["average"] == 55
    assert sparse_all["by_length"] == {4096: 55}
    assert sparse_all["budget"] == pytest.approx(0.2)
    assert sparse_all["minus_dense"]["mean"] == -5
    assert sparse_all["minus_dense"]["standard_error"] == pytest.approx(error / 2)
    assert sparse_all["agreement"]["mean"] == 75
    assert sparse_all["drift"]["mean"] == pytest.approx(0.075)
    assert found["layers"][1] == {"method": "s", "length": 4096, "layers": {"sparse": 2}}


def test_methods_with_fewer_samples_are_compared_on_these():
    records = [record("dense", i, points) for i, points in enumerate([100, 0, 0])]
    found = summarize([*records, record("s", 0, 50)])
    assert [(cell["samples"], cell["score"]) for cell in found["cells"]] == [(3, pytest.approx(100 / 3)), (1, 50)]
    assert found["cells"][1]["minus_dense"] == {"mean": -50, "standard_error": None, "interval": None}


def test_there_is_no_comparison_without_dense():
    alone = summarize([record("s", 0, 50)])["cells"][0]
    assert (alone["minus_dense"], alone["agreement"], alone["drift"]) == (None, None, None)


def test_tasks_that_dense_cannot_do_are_in_no_mean_but_in_rulers():
    records = [record("dense", 0, 10, task=task) for task in ("vt", "rounds")] + [record("dense", 0, 30, "key_values")]
    records += [record("dense", 0, points, task, length=8192) for task, points in (("code_file", 19.9), ("rounds", 20))]
    found = summarize(records)
    assert [(mean["family"], mean["tasks"], mean["average"]) for mean in found["means"]] == [
        ("RULER", 1, 10),
        ("retrieval", 2, 25),
    ]
    assert found["not_in_means"] == [
        {"task": "rounds", "length": 4096, "dense": 10},
        {"task": "code_file", "length": 8192, "dense": 19.9},
    ]
    (code,) = (cell for cell in found["cells"] if cell["task"] == "code_file")
    assert code["exact_match"] == 19.9


def test_a_mean_is_of_methods_that_ran_every_task():
    records = [record(method, 0, 50, task) for method in ("dense", "s") for task in ("vt", "fwe")][:-1]
    dense, sparse = summarize(records)["means"]
    assert (dense["average"], sparse["average"], sparse["drift"]) == (50, None, None)


def test_methods_that_a_density_keeps_from_their_depth_decay_are_named():
    def under(name, **settings):
        return {**record(name, 0, 50), "key": {"method": {"base": "stem-default", **settings}}}

    found = summarize(
        [
            record("dense", 0, 50),
            under("as it runs", density=None, depth_decay=0.3),
            under("alike", density=0.12, depth_decay=0.3),
            under("no decay", density=0.12, depth_decay=1.0),
            under("a rival", density=0.12),
        ]
    )
    assert found["layers_alike"] == ["alike"]
