"""The page of `stem-attn inspect` in a real browser."""

import json
import re

import pytest

import synthetic_layers
from stem_attn import plots
from stem_attn.lab.inspect.report import page
from stem_attn.lab.inspect.run import STEPS

pytestmark = pytest.mark.browser
TEXTS = [f"text of block {i} & <b>more</b>" for i in range(24)]
SIZES = {"desktop": {"width": 1280}, "phone": {"width": 360, "height": 740}}


@pytest.fixture(scope="module")
def made():
    return synthetic_layers.found(layers=3, heads=5, tokens=16 * 24 - 5, block_size=16, methods=2)


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "inspect.html"
    path.write_text(page(synthetic_layers.record(made), made, TEXTS))
    return path


@pytest.fixture(params=["light", "dark"])
def opened(request, browser, file):
    browser.open(file, dark=request.param == "dark")
    browser.wait("document.body.dataset.ready")
    yield browser
    assert browser.problems() == []


def text(browser, selector):
    return browser.run("document.querySelector(arguments[0]).textContent", selector)


def pixel(browser, number, row, column, blocks=24):
    """The colour in the middle of a block, on one of the maps."""
    script = """(() => {
        const canvas = document.querySelectorAll('canvas.map')[arguments[0]], size = canvas.width / arguments[3];
        const [x, y] = [(arguments[2] + 0.5) * size, (arguments[1] + 0.5) * size];
        return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3);
    })()"""
    return browser.run(script, number, row, column, blocks)


def choose(browser, layer, head):
    for name, value in (("layer", layer), ("head", head)):
        browser.run(
            "(() => { const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            " s.dispatchEvent(new Event('change')); })()",
            name,
            value,
        )
    browser.wait(f"document.body.dataset.shown === '{layer}/{head}'")


def test_it_opens_at_the_head_that_lost_most(opened, made):
    record = synthetic_layers.record(made)
    worst = max((one["worst"] for one in record["methods"]), key=lambda one: one["lost"])
    assert opened.run("document.body.dataset.shown") == f"{worst['layer']}/{worst['head']}"
    told = text(opened, "#picked")
    for one in record["layers"][worst["layer"]]["methods"]:
        assert f"{one['method']} keeps {100 * one['density_by_head'][worst['head']]:.1f}%" in told
        assert f"loses {100 * one['lost_by_head'][worst['head']]:.1f}%" in told
    assert re.search("pruned", text(opened, "#cell"))


def test_colours_are_those_of_the_blocks(opened, made):
    for layer, head in ((0, 0), (2, 3)):
        choose(opened, layer, head)
        names = ("paper", "kept", "pruned")
        styles = "getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"
        paper, blue, orange = (
            [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            for color in (opened.run(styles, f"--{name}") for name in names)
        )
        for method in (0, 1):
            kept, mass = made.layers[layer].kept[method].blocks[head], made.layers[layer].mass[head]
            for row, column in ((23, 4), (17, 9), (12, 12), (5, 0), (20, 11)):
                own = blue if kept[row, column] else orange
                share = max(int(mass[row, column]) / STEPS, 0.2 * bool(kept[row, column]))
                wanted = [a + share * (b - a) for a, b in zip(paper, own, strict=True)]
                assert pixel(opened, method, row, column) == pytest.approx(wanted, abs=1.5), (method, row, column)


def test_pointing_at_a_block_reads_it(opened, made):
    choose(opened, 1, 2)
    opened.point("canvas.map", 3.5 / 24, 15.5 / 24)
    opened.wait("document.getElementById('cell').textContent.includes('query block 15')")
    told = text(opened, "#cell")
    step = int(made.layers[1].mass[2, 15, 3])
    share = (
        "Less than 0.01%" if step == 0 else f"About {float(f'{100 * plots.LEAST_MASS ** (1 - step / STEPS):.2g}'):g}%"
    )
    assert f"{share} of the attention of query block 15 falls on key block 3" in told
    for method, name in enumerate(("first", "second")):
        assert f"{name}: {'kept' if made.layers[1].kept[method].blocks[2, 15, 3] else 'pruned'}" in told
    assert TEXTS[15] in told
    assert TEXTS[3] in told
    assert "tokens 48 to 63" in told
    opened.point("canvas.map", 20.5 / 24, 2.5 / 24)  # the future: nothing to read
    assert text(opened, "#cell") == told


def test_keys_move_between_heads_and_blocks(opened):
    choose(opened, 1, 1)
    opened.press("#heads", "ArrowDown", "ArrowRight")
    opened.wait("document.body.dataset.shown === '2/2'")
    assert opened.run("document.getElementById('layer').value") == "2"
    opened.press("#heads", "ArrowDown", "ArrowLeft")  # there is no fourth layer
    opened.wait("document.body.dataset.shown === '2/1'")
    opened.point("canvas.map", 3.5 / 24, 15.5 / 24)
    opened.press("canvas.map", "ArrowDown", "ArrowRight")
    opened.wait("document.getElementById('cell').textContent.includes('query block 16 falls on key block 4.')")
    opened.press("canvas.map", *["ArrowRight"] * 30)  # not beyond the diagonal
    opened.wait("document.getElementById('cell').textContent.includes('query block 16 falls on key block 16.')")


def test_a_click_on_a_small_picture_chooses_it(opened):
    box = opened.run("document.getElementById('heads').getBoundingClientRect().toJSON()")
    tile = (box["width"] - 26) / 5
    opened.point("#heads", (26 + 3.5 * tile) / box["width"], (26 + 0.5 * tile) / box["height"], click=True)
    opened.wait("document.body.dataset.shown === '0/3'")


def test_every_measure_is_drawn(opened):
    seen = set()
    for measure in ("blocks", "density", "lost", "lost difference"):
        opened.run(
            "(() => { const s = document.getElementById('measure'); s.value = arguments[0];"
            " s.dispatchEvent(new Event('change')); })()",
            measure,
        )
        seen.add(opened.run("document.getElementById('heads').toDataURL()"))
    assert len(seen) == 4


def test_the_difference_shows_who_keeps_what(opened, made):
    choose(opened, 0, 4)
    first, second = (made.layers[0].kept[method].blocks[4] for method in (0, 1))
    row, column = (first & ~second).nonzero()[-1].tolist()
    red, _, blue = pixel(opened, 2, row, column)
    assert blue > red + 20
    row, column = (~first & ~second).nonzero()[-1].tolist()
    grey = pixel(opened, 2, row, 0)
    assert max(grey) - min(grey) < 40


def test_charts_follow_the_blocks(opened, made):
    choose(opened, 2, 0)
    lines = opened.run("[...document.querySelectorAll('#kept-chart polyline')].map(l => l.getAttribute('points'))")
    counts = [one.blocks[0].sum(-1).tolist() for one in made.layers[2].kept] + [list(range(1, 25))]
    assert len(lines) == 3
    for line, wanted in zip(lines, counts, strict=True):
        heights = [156 - float(point.split(",")[1]) for point in line.split()]
        assert heights == pytest.approx([n / 24 * 146 for n in wanted], abs=0.01)


def test_the_tables_are_the_record(opened, made):
    record = synthetic_layers.record(made)
    table = "[...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    for row, one in zip(opened.run(table, "#methods"), record["methods"], strict=True):
        assert row[:4] == [
            one["name"],
            f"{one['density']:.4f}",
            f"{one['lost']:.4f}",
            f"{100 * one['top1_agreement']:.2f}%",
        ]
    for row, layer in zip(opened.run(table, "#layers"), record["layers"], strict=True):
        assert row[0] == str(layer["layer"])
        assert row[2:5] == [f"{layer['methods'][0][name]:.4f}" for name in ("density", "lost", "error")]


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_window(browser, file, size):
    browser.open(file, **SIZES[size])
    browser.wait("document.body.dataset.ready")
    assert browser.run("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    assert browser.problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("methods", [1, 2])
def test_a_large_model_and_prompt_fit(browser, tmp_path, methods):
    big = synthetic_layers.found(layers=32, heads=32, tokens=32768, block_size=128, methods=methods)
    path = tmp_path / "inspect.html"
    path.write_text(page(synthetic_layers.record(big), big, ["word " * 128] * 256))
    assert path.stat().st_size < 20e6
    browser.open(path)
    assert int(browser.wait("document.body.dataset.ready")) < 3000  # milliseconds since the page was asked for
    assert browser.problems() == []


def test_the_data_is_json_that_a_script_element_can_hold(file):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert json.loads(found[1])["texts"] == TEXTS
