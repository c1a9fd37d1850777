"""stem-attn tune: the search, its config file, and who reads it."""

import dataclasses
import json
import re

import pytest
import torch

import tiny_model
from stem_attn import StemConfig, cli
from stem_attn.integrations import hf
from stem_attn.integrations.vllm import settings
from stem_attn.lab.answers import read_prompt
from stem_attn.lab.configs import plain_settings
from stem_attn.lab.errors import InputError
from stem_attn.lab.named_methods import parse_methods
from stem_attn.lab.tasks.sparse import running
from stem_attn.lab.tune import run
from stem_attn.lab.tune.forwards import Answers, Outcome
from stem_attn.lab.tune.found import numbers
from stem_attn.lab.tune.levels import levels
from stem_attn.lab.tune.recall import ANSWER_TOKENS, PASSAGE_TOKENS, ask_for_the_rest
from stem_attn.lab.tune.run import check, most_forwards, neighbours, tune, with_layer_budgets
from stem_attn.lab.tune.target import parse_target
from stem_attn.policy import PrefillPolicy, make_settings, read_settings

LENGTH = 384
CONFIG = StemConfig(block_size=16, stride=4)
POLICY = PrefillPolicy(min_seq_len=0, crossover=False)


def prompts(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (1, LENGTH), generator=generator) for _ in range(count)]


def silent(step):
    pass


def search(model, target, ids):
    return tune(model, ids, CONFIG, POLICY, parse_target(target), logit_stride=1, on_step=silent)


WRONG = ["kl", "kl=x", "kl=0", "kl=inf", "top1=0", "top1=1.5", "drift=0", "drift=nan", "agreement=2", "ppl=3"]


@pytest.mark.parametrize("text", WRONG)
def test_targets_that_make_no_sense(text):
    with pytest.raises(InputError, match="--target takes kl=NATS or drift=NATS above 0, or top1=SHARE or agreement"):
        parse_target(text)


@pytest.mark.parametrize("target", ["kl=0.02", "top1=0.9"])
def test_the_target_is_reached_and_the_file_gives_what_was_measured(target):
    model, ids = tiny_model.model(), prompts(2)
    found = search(model, target, ids)
    kind = parse_target(target)
    assert kind.met(found.outcome)
    assert not found.is_dense
    assert found.outcome.density <= found.uniform.reaches.outcome.density
    assert found.outcome == found.by_layer.reaches.outcome
    # Through the adapter: the same density, and the same predictions.
    expected = [model(one).logits for one in ids]
    hf.enable(model, found.config, policy=found.policy)
    agree, kl = [], []
    with torch.no_grad():
        for one, dense in zip(ids, expected, strict=True):
            sparse = model(one).logits[0].log_softmax(-1)
            dense = dense[0].log_softmax(-1)
            kl.append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
            agree.append(float((dense.argmax(-1) == sparse.argmax(-1)).double().mean()))
    assert hf.stats(model).density == pytest.approx(found.outcome.density)
    assert sum(kl) / 2 == pytest.approx(found.outcome.kl_nats, rel=1e-3)
    assert sum(agree) / 2 == pytest.approx(found.outcome.top1_agreement, abs=0.01)


@pytest.mark.parametrize("target", ["drift=0.01", "agreement=0.5"])
def test_a_target_of_answers_is_reached_and_what_was_measured_is_true(target):
    model, ids = tiny_model.model(), [ask_for_the_rest(one, seed) for seed, one in enumerate(prompts(2))]
    found = search(model, target, ids)
    assert parse_target(target).met(found.outcome)
    assert 0 < found.outcome.density < 1
    answers = [answer(model, one) for one in ids]
    lost, same = [], []
    with torch.no_grad():
        for one, written in zip(ids, answers, strict=True):
            whole = torch.cat([one, torch.tensor([written])], 1)
            dense = model(whole).logits[0, LENGTH - 1 : -1].double().log_softmax(-1)
            hf.enable(model, found.config, policy=found.policy)
            read = read_prompt(model, one)
            hf.disable(model)
            rest = model(whole[:, LENGTH:-1], past_key_values=read.cache).logits[0].double()
            sparse = torch.cat([read.logits.double(), rest]).log_softmax(-1)
            picked = [side.gather(-1, torch.tensor(written)[:, None]).mean() for side in (dense, sparse)]
            lost.append(float(picked[0] - picked[1]))
            same.append(sparse.argmax(-1).tolist() == written)
    assert sum(lost) / 2 == pytest.approx(found.outcome.answers.drift_nats, abs=1e-4)
    assert sum(same) / 2 == found.outcome.answers.agreement


def answer(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()


def test_prompts_are_answered_only_where_the_target_asks():
    model, ids = tiny_model.model(), prompts(1)
    assert search(model, "kl=0.05", ids).outcome.answers is None
    assert "drift_nats" not in numbers(search(model, "kl=0.05", ids).outcome)


def test_a_prompt_asks_for_the_rest_of_one_of_its_passages():
    ids = torch.arange(LENGTH)[None]
    asked = [ask_for_the_rest(ids, seed) for seed in range(20)]
    firsts = [int(one[0, -PASSAGE_TOKENS]) for one in asked]
    for one, first in zip(asked, firsts, strict=True):
        assert torch.equal(one[:, :-PASSAGE_TOKENS], ids[:, :-PASSAGE_TOKENS])
        assert one[0, -PASSAGE_TOKENS:].tolist() == list(range(first, first + PASSAGE_TOKENS))
    assert len(set(firsts)) > 10
    assert max(firsts) + PASSAGE_TOKENS + ANSWER_TOKENS < LENGTH - PASSAGE_TOKENS
    with pytest.raises(InputError, match="--length 80 is too short for prompts that ask for a passage"):
        ask_for_the_rest(ids[:, :80], 0)


@pytest.mark.parametrize("sensitive", [0, 1])
def test_a_layer_that_matters_gets_more(sensitive):
    model = tiny_model.model()
    with torch.no_grad():
        model.model.layers[1 - sensitive].self_attn.o_proj.weight *= 0.01
    found = search(model, "kl=0.1", prompts(1))
    factors = found.policy.layer_budgets
    assert factors[sensitive] > 1.2 * factors[1 - sensitive]
    assert found.sensitivity[sensitive] > 10 * found.sensitivity[1 - sensitive]
    assert found.outcome.density < found.uniform.reaches.outcome.density


def test_the_schedule_over_layers_takes_part(monkeypatch):
    """Where it alone does, the answer follows it."""
    model = tiny_model.model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 0.01
    monkeypatch.setattr(run, "_RECIPES", ())
    policy = dataclasses.replace(POLICY, depth_decay=0.5)
    found = tune(model, prompts(1), CONFIG, policy, parse_target("kl=0.1"), logit_stride=1, on_step=silent)
    assert found.recipe == "depth_decay"
    first, second = found.policy.layer_budgets
    assert 2 < first / second < 4.5  # 1.5 / .5, to a block
    assert found.outcome.density < found.uniform.reaches.outcome.density


def test_equal_shares_of_answers_are_told_apart_by_what_they_lose():
    worse, better, best = (
        Outcome(0.2, 0.1, 1.0, {}, Answers(drift, agreement)) for drift, agreement in ((0.9, 0.5), (0.2, 0.5), (2, 1))
    )
    outcomes = [worse, better, best]
    assert min(outcomes[:2], key=parse_target("agreement=0.9").rank) is better
    assert min(outcomes, key=parse_target("agreement=0.9").rank) is best
    assert min(outcomes, key=parse_target("drift=0.1").rank) is better


def test_an_impossible_target_gives_dense_and_an_easy_one_the_least():
    model, ids = tiny_model.model(), prompts(1)
    dense = search(model, "kl=1e-13", ids)
    assert dense.is_dense
    assert dense.outcome.density == 1
    hf.enable(model, dense.config, policy=dense.policy)
    model(ids[0])
    assert hf.stats(model).density is None or hf.stats(model).density == 1
    hf.disable(model)
    easy = search(model, "kl=1000", ids)
    assert easy.outcome.density == pytest.approx(levels(CONFIG, LENGTH)[0].density)
    assert easy.sensitivity == {}


def test_dense_layers_stay_dense_and_are_not_counted():
    model, ids = tiny_model.model(), prompts(1)
    policy = dataclasses.replace(POLICY, dense_layers=(-1,))
    found = tune(model, ids, CONFIG, policy, parse_target("kl=0.01"), logit_stride=1, on_step=silent)
    assert list(found.outcome.densities) == [0]
    assert found.policy.layer_budgets[1] == 1.0
    for layers, said in (((0, 1), "or all are in dense_layers"), ((2,), "not all layers of a model with 2")):
        policy = dataclasses.replace(POLICY, dense_layers=layers)
        with pytest.raises(InputError, match=said):
            tune(model, ids, CONFIG, policy, parse_target("kl=0.01"), logit_stride=1, on_step=silent)


def test_no_more_forwards_are_made_than_told():
    model, ids, steps = tiny_model.model(), prompts(3), []
    arguments = {"logit_stride": 1, "on_step": steps.append}
    found = tune(model, ids[:2], CONFIG, POLICY, parse_target("kl=0.02"), **arguments)
    check(model, ids[2:], found, **arguments)
    most = most_forwards(CONFIG, LENGTH, layers=2, prompts=2, held_out=1)
    assert most / 2 < len(steps) <= most
    assert steps.count("sensitivity") == 2  # one a layer, of the first prompt
    assert {trial.prompts for trial in found.trials if trial.stage in ("uniform", "tuned")} == {2}
    tuned = [trial for trial in found.trials if trial.stage == "tuned"]
    assert steps.count("tuned") == 2 * len(tuned) - 1  # the first of them has run on the first prompt before


def test_deep_models_have_groups_of_neighbours():
    assert neighbours(range(3)) == [range(1), range(1, 2), range(2, 3)]
    groups = neighbours(list(range(32)))
    assert [len(group) for group in groups] == [6, 6, 6, 6, 6, 2]
    assert [layer for group in groups for layer in group] == list(range(32))


def test_too_short_prompts_leave_nothing_to_choose():
    model, config = tiny_model.model(), dataclasses.replace(CONFIG, dense_below=100)
    with pytest.raises(InputError, match="at 384 tokens this config has no budgets to choose from"):
        tune(model, prompts(1), config, POLICY, parse_target("kl=0.01"), logit_stride=1, on_step=silent)


def test_held_out_numbers_are_those_of_other_prompts():
    model, ids = tiny_model.model(), prompts(2)
    found = search(model, "kl=0.02", ids[:1])
    same, other = (check(model, [one], found, logit_stride=1, on_step=silent) for one in ids)
    assert same["tuned"]["kl_nats"] == pytest.approx(found.outcome.kl_nats)
    assert same["uniform"]["kl_nats"] == pytest.approx(found.uniform.reaches.outcome.kl_nats)
    assert other["tuned"]["kl_nats"] != pytest.approx(found.outcome.kl_nats)
    assert other["uniform_at_equal_density"]["density"] == pytest.approx(other["tuned"]["density"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


BASIC = ["--length", str(LENGTH), "--prompts", "1", "--set", "block_size=16", "--set", "min_seq_len=0"]


def test_command_writes_a_config_and_a_record(folder, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    arguments = ["tune", "--model", folder, "--out", str(out), "--target", "kl=0.02", "--held-out", "1", *BASIC]
    assert cli.run(arguments) == 0
    config, policy = make_settings(read_settings(out))
    assert (len(policy.layer_budgets), config.block_size) == (2, 16)
    record = json.loads((tmp_path / "tuned.tune.json").read_text())
    assert record["config"] == json.loads(out.read_text())
    assert record["tuned"]["kl_nats"] <= 0.02
    assert [row["factor"] for row in record["layers"]] == list(policy.layer_budgets)
    assert [text["sha256"] for text in record["texts"]] == list({text["sha256"]: 0 for text in record["texts"]})
    assert {run["stage"] for run in record["runs"]} == {"uniform", "sensitivity", "recipe", "tuned"}
    assert record["held_out"]["tuned"]["kl_nats"] > 0
    printed = capsys.readouterr()
    assert "Budgets by layer" in printed.out
    assert "uniform, equal density" in printed.out
    assert f"{record['density_at_target']['tuned']:.4f} by layer" in printed.out
    said = printed.err.splitlines()
    assert re.fullmatch(r"tune: at most \d+ forwards of 384 tokens", said[0])
    assert re.fullmatch(r"tune: one takes [\d.]+ s, all at most \d+ s", said[1])


def test_command_reaches_a_target_of_answers(folder, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    arguments = ["tune", "--model", folder, "--out", str(out), "--target", "drift=0.01", "--held-out", "1", *BASIC]
    assert cli.run(arguments) == 0
    record = json.loads((tmp_path / "tuned.tune.json").read_text())
    assert record["tuned"]["drift_nats"] <= 0.01
    assert set(record["held_out"]["uniform_at_equal_density"]) == set(record["tuned"])
    printed = capsys.readouterr().out
    assert "drift, nats" in printed
    assert "same answers" in printed


def test_command_says_so_where_only_dense_reaches_the_target(folder, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    arguments = ["tune", "--model", folder, "--out", str(out), "--target", "kl=1e-13", "--held-out", "0", *BASIC]
    assert cli.run(arguments) == 0
    assert "No sparse budget reaches kl=1e-13" in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned.tune.json").read_text())["only_dense"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "kl=none"], "--target takes kl=NATS"),
        (["--target", "drift=1", "--length", "80"], "--length 80 is too short for prompts that ask for a passage"),
        (["--set", "min_seq_len=4096"], "below this config's min_seq_len of 4096"),
        (["--config", "nowhere.json"], "cannot read settings file nowhere.json: No such file"),
        (["--out", "nowhere/tuned.json"], "cannot write nowhere/tuned.json"),
        (["--length", "4096"], "--length 4096 is more than the model's context of 2048 tokens"),
        (["--set", "block_size=20"], "block_size must be a multiple of 16"),
    ],
)
def test_bad_arguments_are_one_clear_line(folder, tmp_path, capsys, arguments, message):
    code = cli.run(["tune", "--model", folder, "--out", str(tmp_path / "tuned.json"), *BASIC, *arguments])
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def two_files(tmp_path):
    """Two configs that differ in their layers' budgets, and the densities they give."""
    files = []
    for name, scales in (("few", {0: 0.4, 1: 0.6}), ("many", {0: 1.2, 1: 0.6})):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(plain_settings(*with_layer_budgets(CONFIG, POLICY, scales, 2))))
    return files


def test_prefill_reads_the_file(folder, two_files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    densities = []
    for file in two_files:
        out = tmp_path / "found.json"
        arguments = ["prefill", "--model", folder, "--prompt-file", str(text), "--new-tokens", "1", "--json", str(out)]
        assert cli.run([*arguments, "--config", str(file)]) == 0
        found = json.loads(out.read_text())
        assert found["settings"]["config"] == json.loads(file.read_text())
        densities.append(found["density"])
    assert densities[0] < densities[1]


def test_fidelity_reads_the_file(folder, two_files, tmp_path):
    few, many = two_files
    arguments = [
        "eval", "fidelity", "--model", folder, "--out", str(tmp_path), "--length", "512", "--prompts", "1",
        "--block-size", "16", "--methods", "", "--variant", f"few=config:{few}", "--variant", f"many=config:{many}",
    ]  # fmt: skip
    assert cli.run(arguments) == 0
    rows = json.loads((tmp_path / "fidelity.json").read_text())["layers"]
    density = {(row["method"], row["layer"]): row["density"] for row in rows}
    assert {row["target"] for row in rows} == {None}
    assert density["few", 0] < density["few", 1] == density["many", 1] < density["many", 0]


def test_ruler_reads_the_file(two_files):
    named_methods = parse_methods(
        "", [f"tuned=config:{two_files[0]}", f"more=config:{two_files[0]},layer_budgets=[2.0, 2.0]"]
    )
    model, budgets = tiny_model.model(), []
    for named in named_methods:
        with torch.no_grad(), running(model, named, 16, None) as kept:
            model(prompts(1)[0])
            budgets.append(kept().budget)
    assert budgets[0] < budgets[1] < 1


def test_bench_reads_the_file(two_files, capsys):
    few = str(two_files[0])
    assert cli.run(["bench", "--config", few]) == 2
    assert "without --ttft one layer is measured" in capsys.readouterr().err
    arguments = ["bench", "--ttft", "--shape", "smollm2", "--layers", "1", "--lengths", "512", "--config", few]
    assert cli.run(arguments) == 2
    assert "layer_budgets has 2 factors, and the model has 1 layers" in capsys.readouterr().err


def test_vllm_reads_the_file(two_files):
    read = settings.parse({"config_file": str(two_files[0]), "decay": 0.5})
    config, policy = make_settings({**read_settings(two_files[0]), "decay": 0.5})
    assert (read.config, read.policy) == (config, policy)
