"""What holds for the pages as text: lines of a readable length, and links between files that lead somewhere."""

import re
import unicodedata

import pytest
from pages import PAGES, ROOT, name_of

OTHERS = ("CONTRIBUTING", "DESIGN", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT", "benchmarks/results/README")
READ_BY_PEOPLE = [*PAGES, *(ROOT / f"{name}.md" for name in OTHERS)]
LOCAL_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def without_code(text):
    return re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors that GitHub and the site make of a page's headings."""
    for heading in HEADING.findall(without_code(text)):
        plain = unicodedata.normalize("NFKC", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", READ_BY_PEOPLE, ids=name_of)
def test_lines_have_at_most_100_characters(page):
    lines = enumerate(page.read_text().splitlines(), 1)
    # A row of a table, a picture and an address cannot be broken.
    prose = [(i, line) for i, line in lines if not line.startswith(("|", "![", "<")) and "](http" not in line]
    assert [(i, len(line)) for i, line in prose if len(line) > 100] == []


@pytest.mark.parametrize("page", READ_BY_PEOPLE, ids=name_of)
def test_links_to_files_and_headings_lead_somewhere(page):
    text = page.read_text()
    for link in LOCAL_LINK.findall(without_code(text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in set(anchors(target.read_text())), f"{name_of(page)}: {link}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_messages_in_troubleshooting_are_the_program_s_own():
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may stand on several lines
    messages = re.findall(r"^### `([^`]+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    assert [message for message in messages if message not in source] == []
