"""Make the pictures of docs/inspect.md and docs/report.md from what the commands write.

    stem-attn inspect --out one
    stem-attn inspect --methods stem-demo,xattention --out both
    stem-attn report results --out worth-it.html
    python docs/pictures/photograph.py one both worth-it.html

Needs stem-attn[dev] and what tests/browser.py needs. The pictures have 96 colours, to be small.
"""

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from browser import Browser  # noqa: E402

LAYER, HEAD = 15, 6
WIDTH, HEIGHT = 1280, 880


def shrink(path: Path, box: tuple[int, int, int, int] | None = None) -> None:
    """Cut a part out of a PNG, and write it with few colours."""
    picture = Image.open(path).convert("RGB").crop(box)
    picture.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def choose(browser: Browser) -> None:
    """Choose the head on a page of `stem-attn inspect`."""
    browser.wait("document.body.dataset.ready")
    script = "document.getElementById(arguments[0]).value = arguments[1]"
    for name, value in (("layer", LAYER), ("head", HEAD)):
        browser.run(script, name, value)
        browser.run("document.getElementById(arguments[0]).dispatchEvent(new Event('change'))", name)
    browser.wait(f"document.body.dataset.shown === '{LAYER}/{HEAD}'")


def main() -> None:
    """Make all pictures."""
    one, both, report = map(Path, sys.argv[1:])
    browser = Browser()
    try:
        browser.open(one / "inspect.html", width=WIDTH, height=HEIGHT)
        choose(browser)
        browser.picture(HERE / "inspect.png")
        shrink(HERE / "inspect.png")

        browser.open(both / "inspect.html", width=WIDTH, height=HEIGHT)
        choose(browser)
        browser.picture(HERE / "both.png", whole=True)
        box = browser.run("document.getElementById('maps').getBoundingClientRect().toJSON()")
        top = box["top"] + browser.run("window.scrollY")
        shrink(HERE / "both.png", (int(box["left"]), int(top), int(box["right"]), int(top + box["height"])))

        browser.open(report, width=WIDTH, height=620)
        browser.picture(HERE / "report.png")
        shrink(HERE / "report.png")
    finally:
        browser.close()
    (HERE / "heads.png").write_bytes((one / "heads.png").read_bytes())
    shrink(HERE / "heads.png")


if __name__ == "__main__":
    main()
