"""RULER with models: decoding, the file of answers, and the command."""

import dataclasses
import json
from io import StringIO

import pytest
import torch
from rich.console import Console

import hf_models
import tiny_model
from stem_attn import cli
from stem_attn.lab.errors import InputError
from stem_attn.lab.models import LoadedModel
from stem_attn.lab.named_methods import NamedMethod
from stem_attn.lab.ruler import run
from stem_attn.lab.ruler.generate import decode, read_prompt
from stem_attn.lab.ruler.report import render
from stem_attn.lab.ruler.run import Settings, chat_frame, evaluate, fingerprint
from stem_attn.lab.ruler.samples import Frame
from stem_attn.lab.ruler.store import Store

LENGTH = 1536  # bytes; the tiny model's context is 2048
DENSE = NamedMethod("dense", "dense")
EVERYTHING = NamedMethod("all", "stem-default", {"min_seq_len": 0, "budget_ratio": 1.0})
SPARSE = NamedMethod("sparse", "stem-default", {"min_seq_len": 0, "budget_ratio": 0.2, "budget_bias": 0})
SETTINGS = Settings(
    tasks=("fwe",),  # the fewest new tokens of the tasks that fit
    lengths=(LENGTH,),
    samples=2,
    methods=(DENSE, SPARSE),
    block_size=16,
    density=None,
    chat=False,
    seed=42,
)


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(tiny_model.model(), tiny_model.tokenizer(), "tiny")


def ruler(loaded, store=None, **changes):
    seen = []
    results = evaluate(loaded, dataclasses.replace(SETTINGS, **changes), store or Store(None), seen.append)
    return results, seen


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])  # gemma3: half of the layers have a window
def test_answers_decoded_together_are_those_of_generate(model_type):
    model = hf_models.tiny_model(model_type)
    model.generation_config.eos_token_id = None
    # Shorter, as long as and longer than the window of 512; two are equally long.
    prompts = [hf_models.tokens(1, length, seed=length) for length in (300, 512, 700, 701)]
    prompts.append(hf_models.tokens(1, 700, seed=5))
    together = decode(model, [read_prompt(model, ids) for ids in prompts], 12)
    with torch.no_grad():
        for ids, answer in zip(prompts, together, strict=True):
            expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
            assert answer == expected
            assert decode(model, [read_prompt(model, ids)], 12) == [expected]


def test_an_answer_stops_before_its_end_token_and_the_others_go_on():
    model = hf_models.tiny_model("llama")
    model.generation_config.eos_token_id = None
    prompts = [hf_models.tokens(1, 100 + 7 * seed, seed=seed) for seed in range(3)]
    full = decode(model, [read_prompt(model, ids) for ids in prompts], 10)
    end = full[0][4]
    model.generation_config.eos_token_id = [end, 1]
    answers = decode(model, [read_prompt(model, ids) for ids in prompts], 10)
    ends = {end, 1}
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), 10)] for row in full]
    assert answers == cut
    assert len(answers[0]) < 5
    assert decode(model, [read_prompt(model, prompts[0])], 1) == [full[0][:1]]


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_store_finds_again_what_was_added(tmp_path):
    file = tmp_path / "answers.jsonl"
    store = Store(file)
    assert file.exists()
    store.add([{"key": {"task": "vt", "index": 1}, "score": 50.0}])
    again = Store(file)
    assert again.get({"index": 1, "task": "vt"}) == {"key": {"task": "vt", "index": 1}, "score": 50.0}
    assert again.get({"index": 2, "task": "vt"}) is None


def test_an_interrupted_line_is_dropped_and_a_foreign_one_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    Store(file).add([{"key": {"index": i}} for i in range(2)])
    with file.open("a") as lines:
        lines.write('{"key": {"ind')
    store = Store(file)
    store.add([{"key": {"index": 2}}])
    assert [json.loads(line)["key"]["index"] for line in file.read_text().splitlines()] == [0, 1, 2]
    file.write_text('{"key": {}}\n{"score": 1}\n')
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: not a record"):
        Store(file)
    with pytest.raises(InputError, match=r"cannot use .* for --out"):
        Store(tmp_path / "nowhere" / "answers.jsonl")


# --- runs -----------------------------------------------------------------------------------------------------------


def test_methods_see_the_same_prompts_and_their_budget_is_told(loaded):
    results, seen = ruler(loaded)
    records = results.records
    assert results.left_out == {}
    assert seen == ["fwe 1536 dense"] * 2 + ["fwe 1536 sparse"] * 2
    by_method = {name: [r for r in records if r["method"] == name] for name in ("dense", "sparse")}
    for name, mine in by_method.items():
        assert [record["index"] for record in mine] == [0, 1], name
    for dense, sparse in zip(*by_method.values(), strict=True):
        assert dense["prompt_sha256"] == sparse["prompt_sha256"]
        assert dense["references"] == sparse["references"]
        assert (dense["budget"], dense["layers"]) == (1.0, {})
        assert 0.2 < sparse["budget"] < 0.5
        assert sparse["layers"] == {"sparse": 2}


def test_sparse_attention_matters_and_keeping_everything_is_dense(loaded):
    records = ruler(loaded, methods=(DENSE, EVERYTHING, SPARSE))[0].records
    answers = {name: [r["answer"] for r in records if r["method"] == name] for name in ("dense", "all", "sparse")}
    assert answers["all"] == answers["dense"]
    assert answers["sparse"] != answers["dense"]
    assert [r["budget"] for r in records if r["method"] == "all"] == [1.0, 1.0]


def test_the_budget_counts_dense_layers(loaded):
    half = dataclasses.replace(SPARSE, name="half", fields={**SPARSE.fields, "dense_layers": [0]})
    records = ruler(loaded, methods=(SPARSE, half), samples=1)[0].records
    assert records[1]["layers"] == {"sparse": 1, "dense layer": 1}
    assert records[1]["budget"] == pytest.approx((1 + records[0]["budget"]) / 2, abs=0.03)
    short = NamedMethod("short", "stem-default", {"min_seq_len": 4096})
    (record,) = ruler(loaded, methods=(short,), samples=1)[0].records
    assert (record["budget"], record["layers"]) == (1.0, {"short prompt": 2})


def test_rivals_run_with_their_own_budget_or_at_a_density(loaded):
    methods = (NamedMethod("x", "xattention", {"threshold": 0.5}), NamedMethod("stem-official", "stem-official"))
    own = ruler(loaded, methods=methods, samples=1)[0].records
    assert 0 < own[0]["budget"] < 1
    assert own[1]["layers"] == {"dense layer": 2}  # it leaves its first two layers dense
    equal = ruler(loaded, methods=methods, samples=1, density=0.3)[0].records
    assert [record["budget"] for record in equal] == [pytest.approx(0.3, abs=0.02)] * 2
    assert equal[1]["budget"] <= 0.3
    assert [record["layers"] for record in equal] == [{"sparse": 2}] * 2


def test_a_method_that_cannot_keep_so_little_is_left_out(loaded):
    results, _ = ruler(loaded, methods=(DENSE, NamedMethod("stem-official", "stem-official")), density=0.001)
    assert [record["method"] for record in results.records] == ["dense"] * 2
    (reason,) = results.left_out.values()
    assert "stem-official keeps at least 0." in reason


def test_a_right_answer_scores(loaded, monkeypatch):
    def answer(model, prompts, new_tokens):
        return [loaded.tokenizer(f" {references[i]}").input_ids for i in range(len(prompts))]

    references = [" ".join(record["references"]).upper() for record in ruler(loaded, methods=(DENSE,))[0].records]
    monkeypatch.setattr(run, "decode", answer)
    assert [record["score"] for record in ruler(loaded, methods=(DENSE,))[0].records] == [100, 100]


def test_a_second_run_only_does_what_is_missing(loaded, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    first = ruler(loaded, Store(file))[0].records
    lines = file.read_text().splitlines()
    assert len(lines) == 4

    read = []
    monkeypatch.setattr(run, "read_prompt", lambda model, ids: read.append(ids) or read_prompt(model, ids))
    again, seen = ruler(loaded, Store(file))
    assert (read, len(seen)) == ([], 4)
    assert json.dumps(again.records) == json.dumps(first)

    ruler(loaded, Store(file), samples=3)
    assert len(read) == 2
    assert file.read_text().splitlines()[:4] == lines
    # Whatever answers depend on makes other keys; a method's name does not.
    renamed = dataclasses.replace(SPARSE, name="renamed")
    ruler(loaded, Store(file), methods=(DENSE, renamed))
    assert len(read) == 2
    changed = dataclasses.replace(SPARSE, fields={**SPARSE.fields, "decay": 0.8})
    for count, settings in ((4, {"seed": 43, "methods": (DENSE,)}), (6, {"methods": (changed,)})):
        ruler(loaded, Store(file), **settings)
        assert len(read) == count
    other = LoadedModel(tiny_model.model(seed=1), loaded.tokenizer, "tiny")
    ruler(other, Store(file), methods=(DENSE,))
    assert len(read) == 8
    assert fingerprint(other.model) != fingerprint(loaded.model) == fingerprint(tiny_model.model())


def test_answers_are_kept_as_they_come(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_CPU_CACHE_BYTES", 1)  # one prompt at a time
    file, lines = tmp_path / "answers.jsonl", []

    def counting(model, prompts, new_tokens):
        lines.append((len(prompts), len(file.read_text().splitlines())))
        return decode(model, prompts, new_tokens)

    monkeypatch.setattr(run, "decode", counting)
    ruler(loaded, Store(file), methods=(DENSE,), samples=3)
    assert lines == [(1, 0), (1, 1), (1, 2)]


def test_an_answer_to_another_prompt_is_refused(loaded, tmp_path):
    file = tmp_path / "answers.jsonl"
    ruler(loaded, Store(file), methods=(DENSE,))
    first, second = map(json.loads, file.read_text().splitlines())
    second["prompt_sha256"] = "0"
    file.write_text("".join(json.dumps(line) + "\n" for line in (first, second)))
    with pytest.raises(InputError, match="another prompt of fwe at 1536, sample 1"):
        ruler(loaded, Store(file))


def test_the_chat_format_goes_around_the_question(loaded, monkeypatch):
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chat_frame(tokenizer) == Frame("<user>", "</user><assistant>")
    read = []
    monkeypatch.setattr(run, "read_prompt", lambda model, ids: read.append(ids) or read_prompt(model, ids))
    chatting = LoadedModel(loaded.model, tokenizer, "tiny")
    ruler(chatting, methods=(DENSE,), samples=1, chat=True, tasks=("niah_single_1",))
    prompt = tokenizer.decode(read[0][0])
    assert prompt.startswith("<user>A special magic number is hidden")
    assert "?</user><assistant> The special magic number for " in prompt
    assert prompt.endswith(" mentioned in the provided text is")
    assert LENGTH - 200 < read[0].shape[1] + 128 <= LENGTH


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def command(folder, *arguments):
    return cli.run(["eval", "ruler", "--model", folder, "--device", "cpu", "--block-size", "16", *arguments])


def test_the_command_writes_tables_and_json(folder, tmp_path, capsys):
    record, out = tmp_path / "ruler.json", tmp_path / "answers.jsonl"
    code = command(
        folder, "--tasks", "niah_single_1,fwe", "--lengths", "1536", "--samples", "2",
        "--variant", "mine=stem-default,min_seq_len=0,budget_bias=8", "--out", str(out), "--json", str(record),
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    for text in ("niah_single_1", "mine", "budget", "stem-default at 1536: layers"):
        assert text in shown
    found = json.loads(record.read_text())
    assert [cell["samples"] for cell in found["cells"]] == [2] * 6
    assert [row["method"] for row in found["methods"]] == ["dense", "stem-default", "mine"]
    assert [row["budget"] == 1 for row in found["methods"]] == [True, True, False]  # too short for the default
    assert found["settings"]["methods"][2]["fields"] == {"min_seq_len": 0, "budget_bias": 8}
    assert found["methods"][2]["interval"] is not None
    assert found["settings"]["chat"] is False
    assert len(out.read_text().splitlines()) == 12

    assert found["essays"] is None
    with StringIO() as file:
        Console(file=file, width=200).print(render({**found, "essays": "a tale"}))
        assert "Essay tasks: their haystack is a tale, not NVIDIA's essays." in file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "niah"], "unknown task 'niah'; known: exact, all, niah_single_1"),
        (["--tasks", "qa_1"], "task qa_1 is not offered"),
        (["--tasks", ","], "--tasks names no task"),
        (["--lengths", "4K"], "--lengths takes positive whole numbers"),
        (["--lengths", "0"], "--lengths takes positive whole numbers"),
        (["--lengths", "4096"], "--lengths 4096 is more than the model's context of 2048"),
        (["--template", "llama"], "--template must be one of auto, base, chat"),
        (["--template", "chat", "--lengths", "1024"], "has no chat template"),
        (["--methods", ","], "nothing to measure"),
        (["--methods", "dense,flash"], "unknown method 'flash'"),
        (["--variant", "a=stem-default,strides=3"], "unknown setting strides"),
        (["--lengths", "200"], "does not fit"),
        (["--out", "/nowhere/answers.jsonl"], "cannot use /nowhere/answers.jsonl for --out"),
        (["--json", "/nowhere/ruler.json"], "cannot write /nowhere/ruler.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, capsys, arguments, message):
    assert command(folder, *arguments) == 2
    assert message in capsys.readouterr().err
