"""Make the pictures of docs/inspect.md and docs/report.md from what the commands write.

    stem-attn inspect --out one
    stem-attn inspect --methods stem-demo,xattention --out both
    stem-attn report results --out worth-it.html
    python docs/pictures/photograph.py one both worth-it.html

Needs stem-attn[dev] and what tests/browser.py needs.
"""

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from browser import Browser  # noqa: E402

LAYER, HEAD = 15, 6
WIDTH, NARROW, HEIGHT = 1280, 980, 960


def shrink(path: Path, *, colors: int | None = None, box: tuple[int, int, int, int] | None = None) -> None:
    """Write a PNG again, smaller: a part of it, or with few colours."""
    picture = Image.open(path).convert("RGB").crop(box)
    if colors is not None:
        picture = picture.quantize(colors, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def photograph(browser: Browser, name: str, *, whole: bool = False) -> None:
    """Keep what a window shows, without the page's scroll bar."""
    browser.run("document.documentElement.style.overflow = 'hidden'")
    browser.picture(HERE / name, whole=whole)


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
        photograph(browser, "inspect.png")
        shrink(HERE / "inspect.png")

        browser.open(both / "inspect.html", width=NARROW, height=HEIGHT)  # the maps stand side by side
        choose(browser)
        photograph(browser, "both.png", whole=True)
        box = browser.run("document.getElementById('maps').getBoundingClientRect().toJSON()")
        top = box["top"] + browser.run("window.scrollY")
        shrink(HERE / "both.png", box=tuple(map(int, (box["left"], top, box["right"], top + box["height"]))))

        browser.open(report, width=WIDTH, height=560)
        photograph(browser, "report.png")
        shrink(HERE / "report.png")
    finally:
        browser.close()
    (HERE / "heads.png").write_bytes((one / "heads.png").read_bytes())
    shrink(HERE / "heads.png", colors=128)


if __name__ == "__main__":
    main()
