"""The project's pages and their code blocks."""

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *SITE]

# What a block may need that a test does not have. The mark follows the language: ```bash gpu
MARKS = {
    "hub": "a model from a hub",
    "gpu": "an NVIDIA GPU",
    "vllm": "vLLM",
    "install": "to install something",
    "minutes": "minutes on a real model",
    "part": "what surrounds it: it is a part of a file",
}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: Its file.
        line: Its first line in the file, from 1 on; the fence itself.
        language: The first word of its info string.
        mark: The second, or "".
        text: What is inside.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    """Read the code blocks of a page; directives of the documentation's generator, ```{name}, are none."""
    found = []
    for token in MarkdownIt().parse(page.read_text()):
        info = token.info.split()
        if token.type == "fence" and not token.info.startswith("{"):
            language, mark = (*info, "", "")[:2]
            found.append(Block(page, token.map[0] + 1, language, mark, token.content))
    return found
