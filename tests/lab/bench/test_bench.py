"""The benchmark command: what it computes, what it refuses to time, what it writes."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers import SMALL
from stem_attn import BlockSelection, StemConfig, backends, select_blocks
from stem_attn.lab.bench import limit
from stem_attn.lab.bench.cases import Case
from stem_attn.lab.bench.run import run_case
from stem_attn.lab.gate import AttentionGate, GateError, check_selection, draw_samples
from stem_attn.lab.shapes import MODELS, Shape
from stem_attn.layout import Layout
from stem_attn.selection import select_top_blocks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Tiny tensors gain nothing from threads, and wait long for them where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(limit, "_SIZE", {"cuda": 256, "cpu": 256})
    yield
    torch.set_num_threads(threads)


def make_case(q_len: int, k_len: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> Case:
    return Case(Shape(4, 2, 32), batch, q_len, k_len, dtype, CPU)


def run(case: Case, config: StemConfig = SMALL, names: tuple[str, ...] = ("sdpa", "cpu")) -> dict:
    return run_case(case, config, list(names), rounds=2, seed=0, on_step=lambda step: None)


@pytest.mark.parametrize(("q_len", "k_len"), [(200, 200), (1, 77), (37, 150), (96, 160)])
def test_work_is_the_number_of_visible_pairs(q_len, k_len):
    case = make_case(q_len, k_len, batch=2)
    q, k, v = case.inputs(0)
    selection = select_blocks(q, k, v, config=SMALL)
    q_pos = torch.arange(k_len - q_len, k_len)[:, None]
    k_pos = torch.arange(k_len)
    causal = k_pos <= q_pos
    kept = selection.to_mask()[:, :, q_pos // 16 - selection.grid.first_block, k_pos // 16] & causal
    assert case.causal_flops() == 4 * 32 * 8 * int(causal.sum())
    assert case.kept_flops(selection) == 4 * 32 * int(kept.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_len", "k_len"), [(1000, 1000), (333, 1000), (512, 1024)])
def test_the_gate_lets_correct_methods_through(q_len, k_len, dtype):
    record = run(make_case(q_len, k_len, dtype, batch=2))
    assert record["failed"] == []
    assert [(m["name"], m["part"]) for m in record["methods"]] == [
        ("sdpa", "dense"),
        ("cpu", "attention"),
        ("cpu", "selection"),
        ("cpu", "whole"),
    ]
    assert 0 < record["density"] < 0.9
    for m in record["methods"]:
        if m["part"] != "selection":
            assert m["error"]["max"] <= m["error_allowed"]["max"]
            assert m["error"]["rms"] <= m["error_allowed"]["rms"]


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
@pytest.mark.parametrize("head_dim", [2, 3, 33, 80])
def test_the_gate_knows_every_head_dim(head_dim, preset):
    case = Case(Shape(4, 2, head_dim), 1, 700, 700, torch.float32, CPU)
    record = run(case, StemConfig.preset(preset, block_size=16))
    assert record["failed"] == []
    assert len(record["methods"]) == 4


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
def test_the_gate_knows_every_preset(preset):
    config = StemConfig.preset(preset, block_size=16)
    record = run(make_case(1500, 1500), config, ("cpu",))
    assert record["failed"] == []
    assert len(record["methods"]) == 3
    assert record["density"] < 1


@pytest.mark.parametrize(
    ("softcap", "sinks", "suffix"), [(2.0, False, " softcap"), (None, True, " sinks"), (2.0, True, " softcap sinks")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_run_without_and_with_softcap_and_sinks(softcap, sinks, suffix, dtype):
    properties = {"softcap": softcap, "sinks": sinks}
    for config in (SMALL, StemConfig(block_size=16, budget_ratio=0.15, budget_bias=2)):
        case = make_case(700, 700, dtype)
        record = run_case(case, config, ["sdpa", "cpu"], rounds=3, seed=0, on_step=lambda step: None, **properties)
        assert record["failed"] == []
        parts = ("attention", "selection", "whole")
        names = [("sdpa", "dense"), *(("cpu", part) for part in parts), *(("cpu" + suffix, part) for part in parts)]
        assert [(m["name"], m["part"]) for m in record["methods"]] == names
        by_name = {(m["name"], m["part"]): m for m in record["methods"]}
        for part in parts:
            with_them, plain = (by_name["cpu" + end, part]["ms"]["samples"] for end in (suffix, ""))
            ratios = [a / b for a, b in zip(with_them, plain, strict=True)]
            assert by_name["cpu" + suffix, part]["over_plain"] == sorted(ratios)[1]
            assert "over_plain" not in by_name["cpu", part]


@pytest.mark.parametrize("forgotten", ["softcap", "sinks"])
def test_a_backend_that_forgets_softcap_or_sinks_is_not_timed(forgotten, monkeypatch):
    backend = type(backends.by_name("cpu"))
    attend = backend.attend

    def forgetful(self, call, *rest):
        attend(self, dataclasses.replace(call, **{forgotten: None}), *rest)

    monkeypatch.setattr(backend, "attend", forgetful)
    how = {"rounds": 1, "seed": 0, "on_step": lambda step: None, "softcap": 1.0, "sinks": True}
    record = run_case(make_case(400, 400), SMALL, ["cpu"], **how)
    assert [(f["name"], f["part"]) for f in record["failed"]] == [
        ("cpu softcap sinks", "attention"),
        ("cpu softcap sinks", "whole"),
    ]


@pytest.mark.parametrize("right", [True, False])
def test_backends_run_with_the_inputs_precision_and_with_the_configs(right, monkeypatch):
    """Eight bits may lose what rounding to e4m3 costs, and more than that is not timed."""
    backend = type(backends.by_name("cpu"))
    attend = backend.attend

    def rounding(self, call, *rest):
        if call.precision == "fp8":
            x = call.layout
            inputs = x.q, x.k, x.v
            powers = (t.abs().log2().round().exp2().copysign(t) for t in inputs)
            rounded = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in inputs) if right else powers
            call = dataclasses.replace(call, layout=Layout.dense(*rounded), precision="auto")
        attend(self, call, *rest)

    monkeypatch.setattr(backend, "attend", rounding)
    monkeypatch.setattr(backend, "why_unsupported", lambda self, call: None)
    record = run(make_case(700, 700), dataclasses.replace(SMALL, precision="fp8"), ("cpu",))
    parts = ("attention", "selection", "whole")
    wrong = [] if right else ["attention", "whole"]
    names = [("cpu", part) for part in parts] + [("cpu fp8", part) for part in parts if part not in wrong]
    assert [(m["name"], m["part"]) for m in record["methods"]] == names
    assert [(f["name"], f["part"]) for f in record["failed"]] == [("cpu fp8", part) for part in wrong]


def test_a_backend_without_the_configs_precision_shows_its_plain_rows_and_the_reason():
    record = run(make_case(300, 300), dataclasses.replace(SMALL, precision="fp8"), ("cpu",))
    assert [(m["name"], m["part"]) for m in record["methods"]] == [
        ("cpu", "attention"),
        ("cpu", "selection"),
        ("cpu", "whole"),
    ]
    ((name, reason),) = ((m["name"], m["reason"]) for m in record["skipped"])
    assert name == "cpu fp8"
    assert "got precision='fp8'" in reason
    assert record["failed"] == []


def test_a_backend_that_cannot_run_at_all_has_one_reason(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: {"cpu": "it is away"})
    record = run(make_case(100, 100), dataclasses.replace(SMALL, precision="fp8"), ("cpu",))
    assert record["skipped"] == [{"name": "cpu", "reason": "it is away"}]


def test_ratios_are_ratios_of_medians():
    record = run(make_case(600, 600))
    ms = {(m["name"], m["part"]): m["ms"]["median"] for m in record["methods"]}
    by_part = {m["part"]: m for m in record["methods"]}
    for part in ("attention", "whole"):
        assert by_part[part]["speedup"]["sdpa"] == ms["sdpa", "dense"] / ms["cpu", part]
        assert by_part[part]["tflops"] == pytest.approx(record["kept_tflop"] / ms["cpu", part] * 1e3)
    assert by_part["dense"]["tflops"] == pytest.approx(record["causal_tflop"] / ms["sdpa", "dense"] * 1e3)
    assert by_part["dense"]["limit_share"] == pytest.approx(by_part["dense"]["tflops"] / record["limit"]["tflops"])
    assert by_part["selection"]["share_of_whole"] == ms["cpu", "selection"] / ms["cpu", "whole"]
    assert record["ideal_speedup"] == pytest.approx(1 / record["density"])
    for m in record["methods"]:
        assert len(m["ms"]["samples"]) == 2
        assert m["ms"]["min"] <= m["ms"]["median"] <= m["ms"]["max"]


def spoiled_backend(monkeypatch, spoil):
    """Let the CPU backend's attention give `spoil(out)`."""
    backend = type(backends.by_name("cpu"))
    attend = backend.attend

    def wrong(self, call, selections, out, lse):
        attend(self, call, selections, out, lse)
        out.copy_(spoil(out))

    monkeypatch.setattr(backend, "attend", wrong)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.001,
        lambda out: out.roll(1, 1),  # heads mixed up
        lambda out: torch.cat([out[:, :, :-1], torch.full_like(out[:, :, -1:], float("nan"))], 2),
    ],
    ids=["scaled", "heads", "nan"],
)
def test_a_wrong_backend_is_not_timed(monkeypatch, spoil):
    spoiled_backend(monkeypatch, spoil)
    record = run(make_case(500, 500))
    assert [m["part"] for m in record["methods"]] == ["dense", "selection"]
    assert [(f["name"], f["part"]) for f in record["failed"]] == [("cpu", "attention"), ("cpu", "whole")]
    assert "float64" in record["failed"][0]["reason"]


def test_a_dropped_block_is_an_error():
    case = make_case(800, 800, torch.bfloat16)
    q, k, v = case.inputs(0)
    selection = select_blocks(q, k, v, config=SMALL)
    gate = AttentionGate(q, k, v, selection, draw_samples(case.batch, case.shape.heads, case.q_len, 0))
    mask = selection.to_mask()
    mask[:, :, 1:, 0] = False  # the sink block
    dropped = BlockSelection.from_mask(mask, block_size=16, q_len=800, k_len=800)
    gate.check(attend(q, k, v, selection))
    with pytest.raises(GateError):
        gate.check(attend(q, k, v, dropped))


def attend(q, k, v, selection):
    blocks = torch.arange(800) // 16
    seen = selection.to_mask()[:, :, blocks[:, None], blocks] & torch.ones(800, 800, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def test_a_wrong_selection_is_an_error(monkeypatch):
    def worst(self, call, part, config, budget):
        grid = call.grid(part)
        scores = torch.rand(*part.q.shape[:2], grid.q_blocks, grid.k_blocks)
        return select_top_blocks(scores, budget.rows(grid), grid, config, call.k.shape[1])

    monkeypatch.setattr(type(backends.by_name("cpu")), "select", worst)
    record = run(make_case(900, 900))
    assert [(f["name"], f["part"]) for f in record["failed"]] == [("cpu", "selection"), ("cpu", "whole")]


@pytest.mark.parametrize("score", ["linear", "mass"])
@pytest.mark.parametrize("scope", ["head", "group", "layer"])
def test_a_selection_with_a_block_too_many_is_an_error(score, scope):
    config = dataclasses.replace(SMALL, score=score, budget_scope=scope)
    case = make_case(900, 900)
    q, k, v = case.inputs(0)
    selection = select_blocks(q, k, v, config=config)
    samples = draw_samples(case.batch, case.shape.heads, case.q_len, 0)
    check_selection(q, k, v, selection, config, samples)
    mask = selection.to_mask()
    last = mask[0, :, -1]
    last[torch.arange(4), (~last).int().argmax(-1)] = True
    more = BlockSelection.from_mask(mask, block_size=16, q_len=900, k_len=900)
    with pytest.raises(GateError):
        check_selection(q, k, v, more, config, samples)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_wrong_block_is_an_error(scope):
    """As many blocks as wanted in every row, but the lowest instead of the best."""
    config = dataclasses.replace(SMALL, score="mass", budget_scope=scope)
    case = make_case(900, 900)
    q, k, v = case.inputs(0)
    selection = select_blocks(-q, k, v, config=config)
    with pytest.raises(GateError):
        check_selection(q, k, v, selection, config, draw_samples(case.batch, case.shape.heads, case.q_len, 0))


def test_unavailable_methods_are_listed_with_the_reason():
    if torch.cuda.is_available():
        pytest.skip("checks what a machine without a GPU lists")
    record = run(make_case(100, 100), names=("fa2", "cudnn", "fa4-dense", "fa4"))
    assert record["methods"] == record["failed"] == []
    assert {m["name"] for m in record["skipped"]} == {"fa2", "cudnn", "fa4-dense", "fa4"}
    assert all(m["reason"] for m in record["skipped"])


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stem_attn", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


TINY = ("--device", "cpu", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--set", "block_size=16")
TINY += ("--set", "min_seq_len=0", "--repeats", "2", "--methods", "sdpa,fa2,cpu", "--lengths", "320,500")


def test_the_command_writes_table_json_csv_and_plot(tmp_path):
    result = bench(*TINY, "--out", str(tmp_path / "new"))
    assert result.returncode == 0, result.stderr
    assert torch.backends.cpu.get_cpu_capability() in result.stdout
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [case["k_len"] for case in found["cases"]] == [320, 500]
    assert found["settings"]["config"]["block_size"] == 16
    assert found["settings"]["seed"] == 0
    assert found["machine"]["versions"]["torch"]
    assert found["cases"][0]["skipped"] == [{"name": "fa2", "reason": "needs a CUDA device"}]
    with (tmp_path / "new" / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for case in found["cases"]:
        for m in case["methods"]:
            row = next(r for r in rows if (r["k_len"], r["part"]) == (str(case["k_len"]), m["part"]))
            assert float(row["ms_median"]) == m["ms"]["median"]
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "ideal speed-up" in (tmp_path / "new" / "bench.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "gpt"), "--shape must be one of llama3-8b"),
        (("--lengths", "1k"), "--lengths takes"),
        (("--lengths", "0"), "--lengths takes"),
        (("--methods", "cpu,magic"), "unknown method magic"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--device", "toaster"), "cannot use device 'toaster'"),
        (("--preset", "nice"), "unknown preset 'nice'"),
        (("--set", "block_size"), "--set takes field=value"),
        (("--set", "block_size=17"), "block_size must be a multiple of 16"),
        (("--heads", "6", "--kv-heads", "4"), "multiple of KV heads"),
        (("--q-len", "9000", "--lengths", "4096"), "--q-len must be from 1"),
        (("--q-len", "0"), "--q-len must be from 1 to the length 8192, got 0"),
        (("--layers", "2"), "--layers has no meaning without --ttft"),
        (("--ttft", "--q-len", "8"), "--q-len has no meaning with --ttft"),
        (("--json", "no/such/folder/a.json"), "cannot write"),
        (("--seed", str(2**64)), "Invalid value for '--seed'"),
        (("--set", "residual=mean"), "take --set residual=none"),
        (("--methods", ","), "unknown method (none)"),
        (("--repeats", "0"), "Invalid value for '--repeats'"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, said, capsys):
    from stem_attn.cli import run as run_command

    assert run_command(["bench", "--device", "cpu", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_failed_method_gives_exit_code_1(monkeypatch, capsys):
    from stem_attn.cli import run as run_command

    spoiled_backend(monkeypatch, lambda out: out + 1)
    assert run_command(["bench", *TINY]) == 1
    assert "FAILED, not timed: cpu attention" in capsys.readouterr().out


def tiny_smollm2(monkeypatch, **fields):
    tiny = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 101, "num_attention_heads": 4}
    monkeypatch.setitem(MODELS, "smollm2", MODELS["smollm2"] | tiny | {"num_key_value_heads": 2} | fields)


TTFT = ["--ttft", "--shape", "smollm2", "--device", "cpu", "--lengths", "600", "--repeats", "1"]
TTFT += ["--set", "block_size=16", "--set", "min_seq_len=0", "--set", "budget_bias=1"]


def test_ttft_compares_dense_and_stem(tmp_path, monkeypatch, capsys):
    from stem_attn.cli import run as run_command

    tiny_smollm2(monkeypatch, num_hidden_layers=3)
    assert run_command(["bench", *TTFT, "--set", "dense_layers=[0]", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    (case,) = found["cases"]
    assert (case["sparse_layers"], found["model"]["layers"]) == (2, 3)
    assert case["dense_reasons"] == {"dense layer": 1}
    assert 0 < case["density"] < 1
    assert case["speedup"] == case["dense"]["s"]["median"] / case["stem"]["s"]["median"]
    assert found["check"]["difference"] <= found["check"]["allowed"]
    assert len(list(csv.DictReader((tmp_path / "bench.csv").open()))) == 2
    assert (tmp_path / "bench.png").exists()


def test_ttft_checks_in_the_models_precision_and_times_in_the_configs(tmp_path, monkeypatch):
    from stem_attn.cli import run as run_command

    tiny_smollm2(monkeypatch, num_hidden_layers=3)
    backend = type(backends.by_name("cpu"))
    attend, asked = backend.attend, []

    def recording(self, call, *rest):
        asked.append((call.q.shape[2], call.precision))
        attend(self, dataclasses.replace(call, precision="auto"), *rest)

    monkeypatch.setattr(backend, "attend", recording)
    monkeypatch.setattr(backend, "why_unsupported", lambda self, call: None)
    out = tmp_path / "bench.json"
    assert run_command(["bench", *TTFT, "--set", "precision=fp8", "--json", str(out)]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert case["sparse_layers"] == 3
    assert asked == [(1024, "auto")] * 3 + [(600, "fp8")] * 6  # a warm-up and a round


def test_ttft_refuses_an_adapter_that_changes_the_logits(monkeypatch):
    from stem_attn.lab.bench import ttft

    tiny_smollm2(monkeypatch)
    model = ttft.build_model("smollm2", 2, 2048, torch.float32, CPU, 0)
    ttft.check_adapter(model, SMALL, 0)
    ttft.check_adapter(model, dataclasses.replace(SMALL, precision="fp8"), 0)  # what 8 bits lose is not its business
    spoiled_backend(monkeypatch, lambda out: out * 1.01)
    with pytest.raises(GateError, match="with every block kept"):
        ttft.check_adapter(model, SMALL, 0)


@pytest.mark.parametrize("folder", ["h200-llama3-8b-fp8", "h100-sinks-softcap"])
def test_a_kernel_with_more_than_its_name_is_drawn_in_another_colour(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from stem_attn.lab.bench.plot import draw

    colors = {}
    plain = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda *args, **how: (colors.update({how["label"]: how["color"]}), plain(*args, **how))[1]
    )
    results = Path(__file__).parents[3] / "benchmarks/results"
    assert draw(json.loads((results / folder / "bench.json").read_text())).startswith(b"\x89PNG")
    extended = {label for label in colors if label.startswith("triton ") and len(label.split()) > 2}
    assert extended
    assert not {colors[label] for label in extended} & {colors[label] for label in colors.keys() - extended}
