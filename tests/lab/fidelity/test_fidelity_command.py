import csv
import json

import pytest

import tiny_model
from stem_attn import cli
from stem_attn.lab.fidelity.report import markdown, ratio_to, summarize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    arguments = [
        "eval", "fidelity", "--model", folder, "--out", str(out), "--length", "512", "--block-size", "16",
        "--prompts", "2", "--densities", "0.6", "--methods", "stem-official,uniform,dense",
        "--variant", "narrow=xattention,stride=4", "--published", "xattention,narrow", "--paper-tests",
        "table1,table5,figure3,figure5", "--logit-stride", "2",
    ]  # fmt: skip
    assert cli.run(arguments) == 0
    return out


def test_every_file_is_written(result):
    assert sorted(file.name for file in result.iterdir()) == [
        "by_density.png", "by_layer_0.6.png", "by_position_0.6.png",
        "fidelity.json", "fidelity.md", "figure3.png", "figure5.png", "layers.csv", "propagated.csv",
    ]  # fmt: skip
    for plot in result.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_record_holds_settings_texts_and_every_case(result):
    record = json.loads((result / "fidelity.json").read_text())
    settings = record["settings"]
    assert (settings["length"], settings["block_size"], settings["seed"]) == (512, 16, 0)
    assert settings["densities"] == [0.6]
    assert record["specs"]["narrow"]["fields"] == {"stride": 4}
    assert "torch" in record["machine"]["versions"]
    assert [len(text["sha256"]) for text in record["texts"]] == [64, 64]
    assert len({text["source"] for text in record["texts"]}) == 2
    cases = {(row["method"], row["target"]) for row in record["propagated"]}
    assert {
        ("stem-official", 0.6),
        ("uniform", 0.6),
        ("narrow", 0.6),
        ("xattention", None),
        ("narrow", None),
        ("dense", None),
    } <= cases
    assert ("dense", 0.6) not in cases
    for row in record["layers"]:
        assert len(row["error_by_position"]) == 8
        if row["target"] and row["method"] != "narrow":
            assert row["density"] == pytest.approx(row["target"], abs=1e-5)
    assert len(record["layers"]) == 2 * len(record["propagated"])  # two layers


def test_csv_holds_the_same_rows(result):
    record = json.loads((result / "fidelity.json").read_text())
    for name in ("layers", "propagated"):
        with (result / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(record[name])
        assert rows[0]["method"] == record[name][0]["method"]
        assert float(rows[-1]["density"]) == record[name][-1]["density"]


def test_markdown_comes_from_the_record(result):
    record = json.loads((result / "fidelity.json").read_text())
    page = (result / "fidelity.md").read_text()
    assert markdown(record).splitlines()[:4] == page.splitlines()[:4]
    found = summarize(record)
    official, uniform = found["stem-official", 0.6], found["uniform", 0.6]
    error, worst, layer = ratio_to(official, uniform)
    line = next(line for line in page.splitlines() if line.startswith("| `uniform` | 0.6"))
    assert f"| {error:.3f} | {worst:.3f} ({layer}) | {uniform.kl_nats / official.kl_nats:.3f} (" in line
    assert "| + TPD + OAM |" in page
    assert "| early half |" in page or "rows=0%-50%" in page.split("Left out")[1]


def test_summary_is_geometric_over_layers_and_plain_over_prompts(result):
    record = json.loads((result / "fidelity.json").read_text())
    one = summarize(record)["uniform", 0.6]
    errors = [r["error"] for r in record["layers"] if (r["method"], r["target"]) == ("uniform", 0.6)]
    product = 1.0
    for error in errors:
        product *= error
    assert one.error == pytest.approx(product ** (1 / 4))
    runs = [r["kl_nats"] for r in record["propagated"] if (r["method"], r["target"]) == ("uniform", 0.6)]
    assert one.kl_nats == pytest.approx(sum(runs) / 2)
    assert one.kl_by_prompt == runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "stem-offical"], "unknown method 'stem-offical'; known: stem-default, stem-default-0.1"),
        (["--variant", "mine"], "--variant takes NAME=METHOD,FIELD=VALUE"),
        (["--variant", "mine=nothing"], "unknown method 'nothing'"),
        (["--variant", "uniform=stem-official"], "the name uniform is taken"),
        (["--variant", "mine=stem-official,betta=1"], "method mine: unknown setting betta"),
        (["--variant", "mine=xattention,stride=5"], "method mine: stride must divide block_size 16"),
        (["--block-size", "20"], "block_size must be a multiple of 16"),
        (["--densities", "0.1,2"], "--densities takes numbers above 0 and up to 1"),
        (["--paper-tests", "table9"], "unknown --paper-tests table9; known: table1, table5, figure3, figure5"),
        (["--length", "4096"], "--length 4096 is more than the model's context of 2048 tokens"),
        (["--prompts", "5", "--text-file", "TEXT"], "the documents hold 1 prompts of 512 tokens, and 5 are asked for"),
        (["--densities", "0.01"], "stem-official keeps at least"),
        (["--methods", ""], "nothing to measure"),
        (
            ["--length", "64", "--block-size", "64"],
            "the prompt has 64 tokens, which is one block of 64: there is nothing",
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(folder, tmp_path, capsys, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    basic = ["--model", folder, "--out", str(tmp_path / "out"), "--length", "512", "--block-size", "16"]
    code = cli.run(["eval", "fidelity", *basic, "--methods", "stem-official", "--prompts", "1", *arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert message in error
