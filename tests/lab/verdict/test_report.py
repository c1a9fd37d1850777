"""`stem-attn report`: what it reads, what it says, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import tiny_model
from stem_attn import PrefillPolicy, StemConfig, __version__, cli
from stem_attn.lab.bench import limit
from stem_attn.lab.configs import DEMO, plain_settings, settings_from_options
from stem_attn.lab.errors import InputError
from stem_attn.lab.fidelity.report import summarize
from stem_attn.lab.shapes import MODELS
from stem_attn.lab.verdict.read import ATTENTION, Accuracy, Evidence, Speed, read, settings_in_words
from stem_attn.lab.verdict.run import NO, OPEN, PERHAPS, YES, headline, judge

SMALL = ["--set", "block_size=16", "--set", "min_seq_len=0", "--set", "budget_ratio=0.1", "--set", "budget_bias=2"]
OLD = Path(__file__).parents[3] / "benchmarks" / "results" / "fidelity-smollm2-8k"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Real result files of every command that runs here, of one tiny model, and one of vLLM as it would be."""
    folder = tmp_path_factory.mktemp("results")
    model = ["--model", tiny_model.save(str(tmp_path_factory.mktemp("tiny"))), "--device", "cpu"]
    tiny = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 101, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    bench = ["bench", "--device", "cpu", "--repeats", "1", "--lengths", "300", *SMALL]
    heads = ["--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--methods", "sdpa,cpu"]
    fidelity = ["--length", "512", "--block-size", "16", "--prompts", "1", "--densities", "0.6"]
    commands = (
        ["prefill", *model, "--max-tokens", "400", "--new-tokens", "1", *SMALL, "--json", "prefill.json"],
        [*bench, *heads, "--out", "bench"],
        [*bench, "--ttft", "--shape", "smollm2", "--out", "ttft"],
        ["eval", "fidelity", *model, *fidelity, "--methods", "stem-official,uniform,dense", "--out", "fidelity"],
        ["eval", "ruler", *model, "--tasks", "fwe", "--lengths", "1536", "--samples", "2", "--block-size", "16",
         "--methods", "dense,stem-official", "--json", "ruler.json"],
        ["tune", *model, "--length", "256", "--prompts", "1", "--held-out", "1", *SMALL, "--out", "tuned.json"],
        ["inspect", *model, "--max-tokens", "400", "--block-size", "16", "--out", "seen",
         "--variant", "small=stem-default,min_seq_len=0,budget_ratio=0.1,budget_bias=2"],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(limit, "_SIZE", {"cuda": 64, "cpu": 64})
        patch.setitem(MODELS, "smollm2", MODELS["smollm2"] | tiny)
        for command in commands:
            assert cli.run(command) == 0, command
    record = json.loads((folder / "prefill.json").read_text())
    run = {"first_token_seconds": 0.5, "next_token_seconds": None, "stats": {"density": 0.3}}
    serving = {
        **{name: record[name] for name in ("arguments", "date", "machine")},
        "command": "serving",
        "settings": {"stem": {"budget_bias": 2}},
        "records": [
            {"chunk": 256, "length": 300, "runs": {"dense": [run], "stem": [run]},
             "first_token_seconds": {"dense": 0.9, "stem": 0.5}}
        ],
    }  # fmt: skip
    (folder / "vllm_prefill.json").write_text(json.dumps(serving))
    (folder / "notes.json").write_text('{"mine": 1}')
    return folder


def load(path):
    return json.loads(path.read_text())


def test_every_number_is_that_of_its_file(results):
    found = read([results])
    speeds = {Path(one.file).relative_to(results).as_posix(): one for one in found.speeds}
    prefill, ttft, bench = (load(results / name) for name in ("prefill.json", "ttft/bench.json", "bench/bench.json"))
    assert set(speeds) == {"prefill.json", "ttft/bench.json", "bench/bench.json", "vllm_prefill.json"}
    assert speeds["prefill.json"].ratio == prefill["dense"]["prefill_seconds"] / prefill["stem"]["prefill_seconds"]
    assert speeds["prefill.json"].length == prefill["prompt"]["tokens"]
    assert speeds["ttft/bench.json"].ratio == pytest.approx(ttft["cases"][0]["speedup"])
    (whole,) = [one for one in bench["cases"][0]["methods"] if one["part"] == "whole"]
    assert speeds["bench/bench.json"].ratio == pytest.approx(whole["speedup"]["sdpa"])
    assert speeds["bench/bench.json"].kind == ATTENTION
    assert speeds["vllm_prefill.json"].ratio == 1.8
    assert speeds["vllm_prefill.json"].settings == "budget_bias=2"
    assert speeds["ttft/bench.json"].settings == "block_size=16, budget_bias=2, min_seq_len=0"

    by_file = {}
    for one in found.accuracies:
        by_file.setdefault(Path(one.file).relative_to(results).as_posix(), []).append(one)
    fidelity = summarize(load(results / "fidelity/fidelity.json"))
    for one in by_file["fidelity/fidelity.json"]:
        assert one.top1_agreement == pytest.approx(fidelity[one.method, 0.6].top1_agreement)
        assert one.kl_nats == pytest.approx(fidelity[one.method, 0.6].kl_nats)
        assert one.is_stem == (one.method == "stem-official")
    assert {one.method for one in by_file["fidelity/fidelity.json"]} == {"stem-official", "uniform"}
    (cell,) = [cell for cell in load(results / "ruler.json")["cells"] if cell["method"] == "stem-official"]
    (ruler,) = by_file["ruler.json"]
    assert (ruler.points, list(ruler.interval)) == (cell["minus_dense"]["mean"], cell["minus_dense"]["interval"])
    (tuned,) = by_file["tuned.tune.json"]
    assert tuned.kl_nats == load(results / "tuned.tune.json")["held_out"]["tuned"]["kl_nats"]
    (seen,) = by_file["seen/inspect.json"]
    assert seen.top1_agreement == load(results / "seen/inspect.json")["methods"][0]["top1_agreement"]
    assert sorted(Path(name).name for name in found.ignored) == ["notes.json", "tuned.json"]


def test_the_command_writes_one_page(results, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.run(["report", str(results), "--out", str(out)]) == 0
    found = read([results])
    assert capsys.readouterr().out == f"{headline(judge(found))}\n{out}\n"
    text = out.read_text()
    for speed in found.speeds:
        assert f"<td>{speed.ratio:.2f}</td>" in text
    for one in found.accuracies:
        if one.kl_nats is not None:
            assert f"<td>{one.kl_nats:.5f}</td>" in text
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(results, tmp_path, browser, width):
    assert cli.run(["report", str(results), "--out", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html", width=width, dark=width < 600)
    assert browser.run("document.querySelectorAll('#speed tbody tr').length") == 4
    assert browser.run("document.querySelector('#headline').textContent") == headline(judge(read([results])))
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.problems() == []


# --- the verdict -----------------------------------------------------------------------------------------------------


SPEED = Speed("first token in vLLM", 32768, 10.0, 5.0, 0.25, "stem-default", "GPU", "speed.json")
TOP1 = Accuracy("next tokens, 3 prompts", "m", 32768, "stem-default", True, 0.25, 128, "a.json", 0.98, 0.01)
TASK = Accuracy("task fwe", "m", 32768, "stem-default", True, 0.25, 128, "r.json", points=0.0, interval=(-1.0, 1.0))


def verdict(speed=None, *accuracies):
    (one,) = judge(Evidence(speeds=[speed] if speed else [], accuracies=list(accuracies)))
    return one


@pytest.mark.parametrize(
    ("stem_seconds", "top1", "answer"),
    [(5.0, 0.98, YES), (5.0, 0.95, PERHAPS), (5.0, 0.8, NO), (9.5, 0.98, NO), (20.0, 1.0, NO)],
)
def test_the_answer_follows_from_speed_and_accuracy(stem_seconds, top1, answer):
    speed = dataclasses.replace(SPEED, stem_seconds=stem_seconds)
    found = verdict(speed, dataclasses.replace(TOP1, top1_agreement=top1))
    assert found.answer == answer
    assert f"{10 / stem_seconds:.2f} times as fast as dense" in found.reason
    if stem_seconds == 5.0:
        assert f"the same next token at {top1:.1%}" in found.reason
        assert found.cautions == ()


@pytest.mark.parametrize(
    ("points", "interval", "samples", "answer"),
    [
        (0.0, (-1.0, 1.0), 50, YES),
        (-5.0, (-7.0, -3.0), None, NO),
        (-5.0, (-12.0, 2.0), 50, PERHAPS),
        (-0.5, (-0.6, -0.4), 50, YES),
        (-50.0, None, 1, PERHAPS),
        (-50.0, (-50.0, -50.0), 2, PERHAPS),
        (-50.0, (-60.0, -40.0), 2, PERHAPS),
        (-100.0, (-100.0, -100.0), 50, NO),
    ],
)
def test_a_task_counts_beyond_chance(points, interval, samples, answer):
    measured = dataclasses.replace(TASK, points=points, interval=interval, samples=samples)
    assert verdict(SPEED, measured).answer == answer


def test_the_worst_task_counts():
    bad = dataclasses.replace(TASK, kind="task vt", points=-30.0, interval=(-35.0, -25.0))
    found = verdict(SPEED, TASK, bad)
    assert found.answer == NO
    assert "task vt -30.0 points against dense" in found.reason


def test_predictions_and_tasks_of_different_files_and_lengths_both_count():
    bad = dataclasses.replace(TASK, kind="task vt", length=30000, points=-30.0, interval=(-35.0, -25.0))
    more = dataclasses.replace(TASK, kind="task cwe", length=30000, file="another.json")
    found = verdict(SPEED, TOP1, bad, more)
    assert found.answer == NO
    assert "98.0% of the positions (stem-default, 32,768 tokens" in found.reason
    assert "task vt -30.0 points against dense, task cwe +0.0 points against dense (stem-default, 30,0" in found.reason
    far = dataclasses.replace(TASK, length=4096)
    assert verdict(SPEED, TOP1, far).cautions == ("Accuracy was measured at 4,096 tokens, speed at 32,768.",)
    assert verdict(SPEED, TOP1, far).answer == YES


def test_what_is_not_measured_leaves_it_open():
    assert verdict(SPEED).answer == OPEN
    assert "run stem-attn eval fidelity" in verdict(SPEED).reason
    found = verdict(None, TOP1)
    assert found.answer == OPEN
    assert "run stem-attn bench --ttft" in found.reason
    found = verdict(dataclasses.replace(SPEED, kind=ATTENTION), TOP1)
    assert found.answer == OPEN
    assert "the rest of the model not counted" in found.reason
    assert verdict(SPEED, dataclasses.replace(TOP1, is_stem=False)).answer == OPEN  # a rival's accuracy says nothing


def test_without_speed_every_method_and_density_is_judged_by_itself():
    easy = dataclasses.replace(TOP1, density=0.4, top1_agreement=0.99)
    poor = dataclasses.replace(TOP1, method="stem-official", top1_agreement=0.5)
    found = judge(Evidence(accuracies=[TOP1, easy, poor, dataclasses.replace(TASK, density=0.26)]))
    assert [(one.settings, one.answer) for one in found] == [
        ("stem-default at density 0.25", OPEN),
        ("stem-default at density 0.40", OPEN),
        ("stem-official at density 0.25", NO),
    ]
    assert "98.0% of the positions, task fwe +0.0 points" in found[0].reason
    assert headline(found) == (
        "Not worth it at 32,768 tokens with stem-official at density 0.25. "
        "Open at 32,768 tokens with stem-default at density 0.25 and 32,768 tokens with stem-default at density 0.40: "
        "something is not measured yet."
    )


def test_other_lengths_and_densities_are_said():
    found = verdict(SPEED, dataclasses.replace(TOP1, length=8192, density=0.5))
    assert found.cautions == (
        "Accuracy was measured at 8,192 tokens, speed at 32,768.",
        "Accuracy was measured at density 0.500, speed at 0.250.",
    )


def test_accuracy_at_as_hard_a_pruning_is_taken():
    easy = dataclasses.replace(TOP1, density=0.6, top1_agreement=1.0)
    hard = dataclasses.replace(TOP1, density=0.24, top1_agreement=0.7)
    assert verdict(SPEED, easy, hard).answer == NO


def test_accuracy_of_the_same_settings_is_taken():
    official = dataclasses.replace(TOP1, method="stem-official", top1_agreement=0.5)
    assert verdict(SPEED, official, dataclasses.replace(TOP1, length=8192)).answer == YES
    found = verdict(SPEED, official)
    assert found.answer == NO
    assert found.cautions == ("Accuracy was measured of stem-official, speed of stem-default.",)


def test_settings_are_named_by_their_preset():
    config = plain_settings(StemConfig.preset("official"), PrefillPolicy.preset("official"))
    assert settings_in_words(config) == "stem-official"
    assert (
        settings_in_words(plain_settings(*settings_from_options("demo", [], own_presets={"demo": DEMO}))) == "stem-demo"
    )
    changed = plain_settings(StemConfig(decay=0.5, budget_ratio=0.2), PrefillPolicy())
    assert settings_in_words(changed) == "budget_ratio=0.2, decay=0.5"


def test_what_is_nearest_to_use_counts_and_the_least_gain_of_its_kind():
    bench = dataclasses.replace(SPEED, kind=ATTENTION, stem_seconds=1.0)
    small_chunks = dataclasses.replace(SPEED, stem_seconds=8.0)
    (found,) = judge(Evidence(speeds=[bench, SPEED, small_chunks], accuracies=[TOP1]))
    assert "1.25 times as fast" in found.reason


def test_the_headline_names_the_lengths():
    short = dataclasses.replace(SPEED, length=4096, stem_seconds=11.0)
    told = headline(judge(Evidence(speeds=[SPEED, short], accuracies=[TOP1])))
    assert told == "Worth it at 32,768 tokens. Not worth it at 4,096 tokens."
    slow = dataclasses.replace(SPEED, settings="stem-official", stem_seconds=11.0)
    told = headline(judge(Evidence(speeds=[SPEED, slow, short], accuracies=[TOP1])))
    assert told == (
        "Worth it at 32,768 tokens with stem-default. "
        "Not worth it at 4,096 tokens and 32,768 tokens with stem-official."
    )
    assert headline([]) == "Nothing here compares Stem with dense attention."


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *folders):
    out = tmp_path / "page.html"
    assert cli.run(["report", *map(str, folders), "--out", str(out)]) == 2
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("stem-attn: error: ")
    return error


def test_an_empty_folder(tmp_path, capsys):
    assert "no result file of stem-attn in" in refused(capsys, tmp_path, tmp_path)
    for text in ("{}", "[1]", '{"machine": "H100"}', '{"machine": null}', '{"machine": {"versions": [3]}}'):
        (tmp_path / "notes.json").write_text(text)
        assert "no result file of stem-attn in" in refused(capsys, tmp_path, tmp_path)


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert "no such folder: " in refused(capsys, tmp_path, tmp_path / "none")


def test_a_file_that_is_cut_off(results, tmp_path, capsys):
    (tmp_path / "bench.json").write_text((results / "bench/bench.json").read_text()[:500])
    assert re.search("bench.json is no JSON, or is cut off", refused(capsys, tmp_path, tmp_path))


def test_a_file_of_another_version(tmp_path, capsys):
    said = refused(capsys, tmp_path, OLD)
    assert f"fidelity.json was written by stem-attn 0.1.0, and {__version__} cannot read it (no 'date' in it)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no cases", "no 'cases' in it"),
        ("unknown command", "not as expected: command 'measure'"),
        ("cases of another form", "no 'methods' in it"),
    ],
)
def test_a_record_of_another_form(results, tmp_path, capsys, change, said):
    record = load(results / "bench/bench.json")
    if change == "no cases":
        del record["cases"]
    elif change == "unknown command":
        record["command"] = "measure"
    else:
        record["cases"] = [{"k_len": 300}]
    (tmp_path / "bench.json").write_text(json.dumps(record))
    assert f"{__version__} cannot read it ({said}" in refused(capsys, tmp_path, tmp_path)


def test_results_of_two_machines_or_models(results, tmp_path, capsys):
    record = load(results / "ttft/bench.json")
    record["machine"]["cpu"] = "Another CPU"
    (tmp_path / "ttft.json").write_text(json.dumps(record))
    said = refused(capsys, tmp_path, results, tmp_path)
    assert "about speed are of several machines" in said
    assert "Another CPU in " in said
    (tmp_path / "ttft.json").unlink()
    record = load(results / "ruler.json")
    record["model"] = "folder/other"
    (tmp_path / "ruler.json").write_text(json.dumps(record))
    assert "about accuracy are of several models" in refused(capsys, tmp_path, results, tmp_path)


def test_a_place_that_cannot_be_written_is_found_first(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stem_attn.lab.verdict.read.read", None)
    assert cli.run(["report", str(results), "--out", str(tmp_path / "none" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_page_is_not_written_over_a_result(results, capsys):
    kept = (results / "ruler.json").read_bytes()
    assert cli.run(["report", str(results), "--out", str(results / "ruler.json")]) == 2
    assert "it is read, too" in capsys.readouterr().err
    assert (results / "ruler.json").read_bytes() == kept


def test_a_doctors_record_beside_the_others_is_no_reason_to_refuse(results, tmp_path):
    record = load(results / "prefill.json")
    kept = {name: record[name] for name in ("arguments", "date", "machine", "settings")}
    (tmp_path / "doctor.json").write_text(json.dumps({"command": "doctor", **kept, "backends": []}))
    assert len(read([results, tmp_path]).speeds) == len(read([results]).speeds)


def test_a_folder_given_twice_counts_once(results):
    assert len(read([results, results / "bench"]).records) == len(read([results]).records)
    with pytest.raises(InputError, match="no such folder"):
        read([results / "none"])
