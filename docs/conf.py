"""Settings of the documentation's generator: Sphinx, with Markdown by MyST and the theme Furo."""

import re
from typing import Any

import stem_attn

project = "stem-attn"
author = "stem-attn contributors"
copyright = f"2026, {author}"
version = release = stem_attn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # a link to page.md#some-heading is checked

default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "returns_style")]

html_theme = "furo"
html_title = f"stem-attn {release}"
html_show_sourcelink = False

linkcheck_anchors = False
linkcheck_ignore = [r"http://127\.0\.0\.1"]


def setup(app: Any) -> None:
    """Let links to Markdown files outside this folder, which GitHub shows as pages, lead to the files."""
    app.connect("source-read", _link_files_outside)


def _link_files_outside(app: Any, page: str, source: list[str]) -> None:
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])
