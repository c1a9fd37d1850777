"""What `stem-attn inspect` finds, packs and writes."""

import base64
import dataclasses
import json
import zlib

import pytest
import torch

import synthetic_layers
import tiny_model
from stem_attn import PrefillPolicy, StemConfig, cli, select_blocks
from stem_attn.integrations import hf
from stem_attn.lab.inspect import pack
from stem_attn.lab.inspect.report import numbers, sentence
from stem_attn.lab.inspect.run import STEPS, look
from stem_attn.lab.intercept import intercept
from stem_attn.lab.named_methods import parse_methods
from stem_attn.plots import LEAST_MASS

FIELDS = {"block_size": 16, "budget_ratio": 0.2, "budget_bias": 0}
VARIANT = "small=stem-default,min_seq_len=0,budget_ratio=0.2,budget_bias=0"
TOKENS = 390


def ids():
    return torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def view(*variants, rows=None, model=None):
    methods = parse_methods("", variants or [VARIANT])
    blocks = -(-TOKENS // 16)
    rows = range(blocks) if rows is None else rows
    return look(model or tiny_model.model(), ids(), methods, block_size=16, rows=rows, on_step=lambda step: None)


@pytest.fixture(scope="module")
def seen():
    return view()


@pytest.fixture(scope="module")
def inputs():
    """q, k, v and the scale of both layers of a dense forward."""
    found = []

    def attend(layer, q, k, v, scale):
        found.append((q, k, v, scale))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    model = tiny_model.model()
    with torch.inference_mode(), intercept(model, attend):
        model(ids(), use_cache=False)
    return found


def block_mass(q, k, scale):
    """Attention by block, from the whole matrix: float64 [H, Qb, Kb]."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q.double() @ keys.mT * scale).masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -torch.inf)
    probabilities = torch.nn.functional.pad(logits.softmax(-1)[0], (0, -TOKENS % 16, 0, -TOKENS % 16))
    sums = probabilities.unflatten(2, (-1, 16)).sum(3).unflatten(1, (-1, 16)).sum(2)
    return sums / sums.sum(-1, keepdim=True)


def test_blocks_lost_mass_and_density_are_the_librarys(seen, inputs):
    assert len(seen.layers) == len(inputs) == 2
    for number, (layer, (q, k, v, scale)) in enumerate(zip(seen.layers, inputs, strict=True)):
        config = PrefillPolicy().layer_config(StemConfig(**FIELDS), number, 2)
        selection = select_blocks(q, k, v, config=config, scale=scale)
        mask, mass = selection.to_mask()[0], block_mass(q, k, scale)
        (kept,) = layer.kept
        assert torch.equal(kept.blocks, mask)
        lost = (mass * ~mask).sum(-1)
        assert lost.max() > 0.05
        torch.testing.assert_close(kept.lost.double(), lost, rtol=1e-4, atol=1e-6)
        assert kept.lost_by_head == pytest.approx(lost.mean(1).tolist(), rel=1e-4)
        assert sum(kept.density) / len(kept.density) == pytest.approx(selection.density())
        exact = (STEPS * (1 - mass.clamp(LEAST_MASS, 1).log() / torch.tensor(LEAST_MASS).log())).clamp(0, STEPS)
        assert (layer.mass - exact).abs().max() < 0.501


def test_some_rows_are_those_of_all(seen):
    rows = [3, 10, 24]
    some = view(rows=rows)
    for layer, whole in zip(some.layers, seen.layers, strict=True):
        assert torch.equal(layer.mass, whole.mass[:, rows])
        assert torch.equal(layer.kept[0].blocks, whole.kept[0].blocks[:, rows])
        torch.testing.assert_close(layer.kept[0].lost, whole.kept[0].lost[:, rows])
        assert layer.kept[0].density == whole.kept[0].density


def test_whether_it_mattered_is_what_the_adapter_does(seen):
    model = tiny_model.model()
    with torch.inference_mode():
        dense = model(ids()).logits[0].double().log_softmax(-1)
        hf.enable(model, StemConfig(**FIELDS), policy=PrefillPolicy(min_seq_len=0, crossover=False))
        sparse = model(ids()).logits[0].double().log_softmax(-1)
    (outcome,) = seen.outcomes
    assert outcome.density == pytest.approx(hf.stats(model).density)
    assert outcome.top1_agreement == (dense.argmax(-1) == sparse.argmax(-1)).double().mean()
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    assert outcome.mean_kl_nats == pytest.approx(kl, rel=1e-3)
    assert outcome.mean_kl_nats > 1e-3
    assert outcome.sparse_layers == 2
    assert outcome.rest_seconds > 0


def test_dense_layers_of_a_policy_keep_everything():
    found = view(VARIANT + ",dense_layers=[0]")
    assert found.layers[0].kept[0].density == [1.0] * 4
    assert float(found.layers[0].kept[0].lost.abs().max()) == 0
    assert found.layers[1].kept[0].density[0] < 1
    assert found.outcomes[0].sparse_layers == 1


# --- packing ---------------------------------------------------------------------------------------------------------


def unpack(text, rows, heads, methods):
    """Read back what `pack_layer` wrote, slowly."""
    data = zlib.decompress(base64.b64decode(text))
    cells = sum(row + 1 for row in rows)
    mass_bytes, bit_bytes = -(-heads * cells // 2), -(-heads * cells // 8)
    nibbles = [byte >> shift & 15 for byte in data[:mass_bytes] for shift in (0, 4)][: heads * cells]
    kept = []
    for method in range(methods):
        start = mass_bytes + method * bit_bytes
        kept.append([byte >> bit & 1 for byte in data[start : start + bit_bytes] for bit in range(8)][: heads * cells])
    return nibbles, kept, list(data[mass_bytes + methods * bit_bytes :])


@pytest.mark.parametrize("heads", [1, 3])
def test_a_packed_layer_holds_every_block(heads):
    made = synthetic_layers.found(layers=1, heads=heads, tokens=16 * 11 - 3, block_size=16, methods=2)
    (layer,) = made.layers
    nibbles, kept, lost = unpack(pack.pack_layer(layer, made.rows), made.rows, heads, 2)
    places = [
        (head, r, column) for head in range(heads) for r, row in enumerate(made.rows) for column in range(row + 1)
    ]
    assert nibbles == [int(layer.mass[place]) for place in places]
    for method, bits in enumerate(kept):
        assert bits == [int(layer.kept[method].blocks[place]) for place in places]
    assert lost == [round(255 * float(x)) for one in layer.kept for x in one.lost.flatten()]


def test_rows_are_all_that_fit():
    assert pack.rows_to_show(256, 1024) == list(range(256))  # 32 x 32 heads of 32K tokens
    many = pack.rows_to_show(1024, 1024)
    assert 32 <= len(many) < 256
    assert many[-1] == 1023
    assert pack.rows_to_show(100, 4, wanted=5) == [19, 39, 59, 79, 99]
    assert pack.rows_to_show(100, 4, wanted=1000) == list(range(100))


def test_a_page_that_is_too_large_shows_fewer_rows(monkeypatch):
    made = synthetic_layers.found(layers=2, heads=2, tokens=16 * 40, block_size=16)
    _, whole = pack.packed(made)
    monkeypatch.setattr(pack, "PAGE_BYTES", sum(map(len, whole)) // 3)
    fewer, texts = pack.packed(made)
    assert fewer.rows == list(range(3, 40, 4))
    assert sum(map(len, texts)) <= pack.PAGE_BYTES
    assert torch.equal(fewer.layers[1].mass, made.layers[1].mass[:, 3::4])


# --- words and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "it did not matter"), (0.98, "it hardly mattered"), (0.93, "mattered a little"), (0.5, "and it mattered:")],
)
def test_the_sentence_follows_from_the_numbers(seen, share, words):
    outcome = dataclasses.replace(seen.outcomes[0], top1_agreement=share, density=0.25)
    told = sentence(numbers(dataclasses.replace(seen, outcomes=[outcome]), ["small"]))
    assert told.startswith("small pruned 75.0% of the blocks and with them ")
    assert words in told
    assert told.endswith(f"at {share:.1%} of the positions the model predicts the same next token.")


def test_nothing_pruned_is_said():
    found = view("all=stem-default,min_seq_len=0,budget_ratio=1,decay=1")
    assert sentence(numbers(found, ["all"])).startswith("all pruned nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(str(tmp_path_factory.mktemp("tiny")))


def command(folder, out, *more):
    return cli.run(["inspect", "--model", folder, "--device", "cpu", "--max-tokens", "400", "--out", str(out), *more])


def test_the_command_writes_the_page_the_numbers_and_pictures(folder, tmp_path, capsys):
    out = tmp_path / "new"
    assert command(folder, out, "--variant", VARIANT, "--methods", "dense", "--block-size", "16") == 0
    assert {file.name for file in out.iterdir()} == {
        "inspect.html", "inspect.json", "heads.png", "layers.png", "worst_head.png"
    }  # fmt: skip
    record = json.loads((out / "inspect.json").read_text())
    assert [one["name"] for one in record["methods"]] == ["dense", "small"]
    assert record["methods"][0]["density"] == record["methods"][0]["top1_agreement"] == 1
    assert record["settings"]["methods"]["small"]["budget_bias"] == 0
    page = (out / "inspect.html").read_text()
    assert capsys.readouterr().out.splitlines()[0] == sentence(record)
    for one in record["methods"]:
        assert f"<td>{one['mean_kl_nats']:.5f}</td>" in page
        for layer in record["layers"]:
            assert f"<td>{layer['dense_seconds'] * 1000:.2f}</td>" in page
    assert folder not in page  # a model's folder is nobody's business
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_no_text_of_a_prompt_can_end_the_script(folder, tmp_path):
    text = tmp_path / "text"
    text.write_text("</script><script>alert(1)</script><!-- " * 10)
    assert command(folder, tmp_path, "--prompt-file", str(text), "--variant", VARIANT, "--block-size", "16") == 0
    page = (tmp_path / "inspect.html").read_text()
    assert "<script>alert" not in page
    assert "\\u003c" in page


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-tokens", "60"], "tokens, which is one block of 64: there is nothing to prune"),
        (["--methods", "stem-default"], "too short: stem-default starts at 4096"),
        (["--methods", ","], "one method or two, got (none)"),
        (["--methods", "dense,oracle,uniform"], "one method or two, got dense, oracle, uniform"),
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--variant", "other=stem-default,block_size=32"], "other has blocks of 32, and --block-size is 64"),
        (["--model", "/no/such/folder"], "no such model folder"),
        (["--prompt-file", "/no/such/text"], "cannot read /no/such/text"),
        (["--block-size", "7"], "block_size"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, capsys, more, said):
    out = tmp_path / "out"
    assert command(folder, out, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stem-attn: error: ")
    assert said in error
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/inspect", "{file}"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(folder, tmp_path, capsys, monkeypatch, place):
    monkeypatch.setattr("stem_attn.lab.models.load", None)
    (tmp_path / "file").touch()
    assert command(folder, place.replace("{file}", str(tmp_path / "file"))) == 2
    assert capsys.readouterr().err.startswith("stem-attn: error: --out ")
