"""Runs: the same prompts under every method, what is kept of them, and the signals."""

import dataclasses
import json

import pytest

import tiny_model
from stem_attn.config import field_names
from stem_attn.lab.answers import decode, read_prompt
from stem_attn.lab.errors import InputError
from stem_attn.lab.models import LoadedModel
from stem_attn.lab.named_methods import NamedMethod, parse_methods
from stem_attn.lab.tasks import run
from stem_attn.lab.tasks.run import Settings, chat_frame, evaluate, fingerprint
from stem_attn.lab.tasks.samples import Frame
from stem_attn.lab.tasks.store import Store
from stem_attn.lab.tasks.summary import summarize

LENGTH = 1536  # bytes; the tiny model's context is 2048
DENSE = NamedMethod("dense", "dense")
EVERYTHING = NamedMethod("all", "stem-default", {"min_seq_len": 0, "budget_ratio": 1.0})
FIELDS = {"min_seq_len": 0, "budget_ratio": 0.2, "budget_bias": 0, "depth_decay": 1.0}
SPARSE = NamedMethod("sparse", "stem-default", FIELDS)
SETTINGS = Settings(
    tasks=("fwe",),  # the fewest new tokens of RULER's tasks that fit
    lengths=(LENGTH,),
    samples=(0, 1),
    methods=(DENSE, SPARSE),
    block_size=16,
    density=None,
    chat=False,
    seed=42,
)


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(tiny_model.model(), tiny_model.tokenizer(), "tiny")


@pytest.fixture
def read(monkeypatch):
    """The prompts that were prefilled."""
    prompts = []
    monkeypatch.setattr(run, "read_prompt", lambda model, ids: prompts.append(ids) or read_prompt(model, ids))
    return prompts


def ran(loaded, store=None, stop=lambda: False, **changes):
    seen = []
    results = evaluate(loaded, dataclasses.replace(SETTINGS, **changes), store or Store(None), seen.append, stop)
    return results, seen


def by_method(results):
    names = dict.fromkeys(record["method"] for record in results.records)
    return {name: [record for record in results.records if record["method"] == name] for name in names}


def test_methods_see_the_same_prompts_and_their_budget_is_told(loaded):
    results, seen = ran(loaded)
    assert results.left_out == {}
    assert not results.stopped
    assert seen == ["fwe at 1536 dense", "fwe at 1536 sparse"] * 2
    records = by_method(results)
    assert [record["index"] for record in records["dense"]] == [0, 1]
    for dense, sparse in zip(*records.values(), strict=True):
        assert dense["prompt_sha256"] == sparse["prompt_sha256"]
        assert dense["references"] == sparse["references"]
        assert (dense["budget"], dense["layers"]) == (1.0, {})
        assert 0.2 < sparse["budget"] < 0.5
        assert sparse["layers"] == {"sparse": 2}


def test_keeping_everything_is_dense_in_answers_and_drift_and_sparse_attention_is_not(loaded):
    results, _ = ran(loaded, methods=(DENSE, EVERYTHING, SPARSE))
    records = by_method(results)
    answers = {name: [record["answer"] for record in mine] for name, mine in records.items()}
    assert answers["all"] == answers["dense"]
    assert answers["sparse"] != answers["dense"]
    assert [record["budget"] for record in records["all"]] == [1.0, 1.0]
    everything, sparse = summarize(results.records)["cells"][1:]
    assert everything["agreement"]["mean"] == 100
    assert everything["drift"]["mean"] == pytest.approx(0, abs=1e-5)
    assert sparse["agreement"]["mean"] < 100
    assert sparse["drift"]["mean"] > 0.01
    assert sparse["drift"]["interval"][0] < sparse["drift"]["mean"]


def test_the_drift_of_dense_against_itself_is_nothing(loaded):
    """The reference goes through the same passes as a method."""
    results, _ = ran(loaded, methods=(DENSE, NamedMethod("again", "dense")))
    cell = summarize(results.records)["cells"][1]
    assert cell["drift"]["mean"] == 0
    assert cell["agreement"]["mean"] == 100


def test_drift_does_not_depend_on_when_dense_was_run_or_on_what_ran_beside(loaded, monkeypatch):
    at_once = by_method(ran(loaded, methods=(DENSE, EVERYTHING, SPARSE))[0])["sparse"]
    store = Store(None)
    ran(loaded, store, methods=(DENSE,))
    later = by_method(ran(loaded, store)[0])["sparse"]
    monkeypatch.setattr(run, "_CPU_CACHE_BYTES", 1)  # one reading at a time
    alone = by_method(ran(loaded)[0])["sparse"]
    for records in (later, alone):
        for one, other in zip(records, at_once, strict=True):
            assert one["answer"] == other["answer"]
            expected = pytest.approx(other["dense_answer_log_probability"], abs=1e-5)
            assert one["dense_answer_log_probability"] == expected


def test_the_budget_counts_dense_layers(loaded):
    half = dataclasses.replace(SPARSE, name="half", fields={**SPARSE.fields, "dense_layers": [0]})
    records = ran(loaded, methods=(DENSE, SPARSE, half), samples=(0,))[0].records
    assert records[2]["layers"] == {"sparse": 1, "dense layer": 1}
    assert records[2]["budget"] == pytest.approx((1 + records[1]["budget"]) / 2, abs=0.03)
    short = NamedMethod("short", "stem-default", {"min_seq_len": 4096})
    record = ran(loaded, methods=(DENSE, short), samples=(0,))[0].records[1]
    assert (record["budget"], record["layers"]) == (1.0, {"short prompt": 2})


def test_rivals_run_with_their_own_budget_or_at_a_density(loaded):
    methods = (DENSE, NamedMethod("x", "xattention", {"threshold": 0.5}), NamedMethod("stem-official", "stem-official"))
    own = ran(loaded, methods=methods, samples=(0,))[0].records[1:]
    assert 0 < own[0]["budget"] < 1
    assert own[1]["layers"] == {"dense layer": 2}  # it leaves its first two layers dense
    equal = ran(loaded, methods=methods, samples=(0,), density=0.3)[0].records[1:]
    assert [record["budget"] for record in equal] == [pytest.approx(0.3, abs=0.02)] * 2
    assert equal[1]["budget"] <= 0.3
    assert [record["layers"] for record in equal] == [{"sparse": 2}] * 2


def test_a_method_that_cannot_keep_so_little_is_left_out(loaded):
    methods = (DENSE, NamedMethod("stem-official", "stem-official"), NamedMethod("x", "xattention"))
    results, _ = ran(loaded, methods=methods, density=0.4)
    assert [record["method"] for record in results.records] == ["dense", "stem-official", "x"] * 2
    results, _ = ran(loaded, methods=methods[:2], density=0.001)
    assert [record["method"] for record in results.records] == ["dense"] * 2
    (reason,) = results.left_out.values()
    assert "stem-official keeps at least 0." in reason


def test_a_right_answer_scores(loaded, monkeypatch):
    def answer(model, read, new_tokens):
        return [loaded.tokenizer(f" {wanted.pop(0)}").input_ids]

    wanted = [" ".join(record["references"]).upper() for record in ran(loaded, methods=(DENSE,))[0].records]
    monkeypatch.setattr(run, "decode", answer)
    assert [record["score"] for record in ran(loaded, methods=(DENSE,))[0].records] == [100, 100]


def test_a_second_run_only_does_what_is_missing(loaded, tmp_path, read):
    file = tmp_path / "answers.jsonl"
    first = ran(loaded, Store(file))[0].records
    lines = file.read_text().splitlines()
    assert len(lines) == len(read) == 4
    read.clear()

    again, seen = ran(loaded, Store(file))
    assert (read, len(seen)) == ([], 4)
    assert json.dumps(again.records) == json.dumps(first)

    ran(loaded, Store(file), samples=(0, 1, 2))
    assert len(read) == 2
    assert file.read_text().splitlines()[:4] == lines
    # Whatever answers depend on makes other keys; a method's name does not.
    renamed = dataclasses.replace(SPARSE, name="renamed")
    ran(loaded, Store(file), methods=(DENSE, renamed))
    assert len(read) == 2
    changed = dataclasses.replace(SPARSE, fields={**SPARSE.fields, "decay": 0.8})
    for count, settings in ((4, {"seed": 43, "methods": (DENSE,)}), (6, {"methods": (DENSE, changed)})):
        ran(loaded, Store(file), **settings)
        assert len(read) == count
    other = LoadedModel(tiny_model.model(seed=1), loaded.tokenizer, "tiny")
    ran(other, Store(file), methods=(DENSE,))
    assert len(read) == 8
    assert fingerprint(other.model) != fingerprint(loaded.model) == fingerprint(tiny_model.model())


@pytest.mark.parametrize("name", ["uniform", "xattention+tail"])
def test_another_process_finds_the_answers_of_methods_that_hold_a_config(loaded, name):
    """A config's hash, which it keeps, is another one in every process."""
    (named,) = parse_methods(name)
    key = ran(loaded, methods=(DENSE, named), samples=(0,))[0].records[1]["key"]["method"]
    assert set(key["config"]) == set(field_names())
    assert key["config"]["block_size"] == 16


def test_a_run_that_stops_has_whole_samples_and_is_continued(loaded, tmp_path, read):
    file, asked = tmp_path / "answers.jsonl", []

    def stop():
        asked.append(None)
        return len(asked) > 3

    tasks = ("fwe", "key_values")
    results, _ = ran(loaded, Store(file), stop, tasks=tasks)
    assert results.stopped
    assert [(r["task"], r["index"], r["method"]) for r in results.records] == [
        (task, index, method)
        for task, index in (("fwe", 0), ("key_values", 0), ("fwe", 1))
        for method in ("dense", "sparse")
    ]
    assert len(read) == 6
    whole, _ = ran(loaded, Store(file), tasks=tasks)
    assert len(read) == 8
    assert len(whole.records) == 8


def test_parts_make_the_prompts_of_the_whole(loaded, tmp_path):
    whole = {record["index"]: record["prompt_sha256"] for record in ran(loaded, samples=(0, 1, 2, 3))[0].records}
    part = {record["index"]: record["prompt_sha256"] for record in ran(loaded, samples=(1, 3))[0].records}
    assert part == {1: whole[1], 3: whole[3]}


def test_answers_are_kept_as_they_come(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_CPU_CACHE_BYTES", 1)  # one reading at a time
    file, lines = tmp_path / "answers.jsonl", []

    def counting(model, read, new_tokens):
        lines.append((read.logits.shape[0], len(file.read_text().splitlines()) if file.exists() else 0))
        return decode(model, read, new_tokens)

    monkeypatch.setattr(run, "decode", counting)
    ran(loaded, Store(file))
    assert lines == [(1, 0), (1, 1), (1, 2), (1, 3)]
    monkeypatch.setattr(run, "_CPU_CACHE_BYTES", 2**30)
    lines.clear()
    ran(loaded, Store(file), samples=(2,))
    assert lines == [(2, 4)]


def test_an_answer_to_another_prompt_is_refused(loaded, tmp_path):
    file = tmp_path / "answers.jsonl"
    ran(loaded, Store(file), methods=(DENSE,))
    first, second = map(json.loads, file.read_text().splitlines())
    second["prompt_sha256"] = "0"
    file.write_text("".join(json.dumps(line) + "\n" for line in (first, second)))
    with pytest.raises(InputError, match="another prompt of fwe at 1536, sample 1"):
        ran(loaded, Store(file))


def test_the_chat_format_goes_around_the_question_but_not_around_code(loaded, read):
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chat_frame(tokenizer) == Frame("<user>", "</user><assistant>")
    chatting = LoadedModel(loaded.model, tokenizer, "tiny")
    results, _ = ran(chatting, methods=(DENSE,), samples=(0,), chat=True, tasks=("niah_single_1", "code_file"))
    prompt, code = (tokenizer.decode(ids[0]) for ids in read)
    assert prompt.startswith("<user>A special magic number is hidden")
    assert "?</user><assistant> The special magic number for " in prompt
    assert prompt.endswith(" mentioned in the provided text is")
    assert LENGTH - 200 < read[0].shape[1] + 128 <= LENGTH
    assert code.startswith("Please complete the code given below.")
    assert code.endswith("Next line of code:\n")
    assert [record["chat"] for record in results.records] == [True, False]
