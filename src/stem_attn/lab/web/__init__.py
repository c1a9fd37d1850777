"""Pages that are one file each: they open from a disk, and ask no network for anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LAB = Path(__file__).parent.parent


def render(template: str, **values: Any) -> str:
    """Fill in a template.

    A template extends `web/base.html`; `source("inspect/page.js")` puts another file into it as it is, and the filter
    `data` puts a value into a script element as JSON.

    Args:
        template: A file below `lab`.
        values: What it names. Texts are escaped.

    Raises:
        ImportError: jinja2 is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def source(name: str) -> Markup:
        return Markup((_LAB / name).read_text(encoding="utf-8"))

    def data(value: Any) -> Markup:
        # No text of a prompt may end the script element, or be read as the begin of another one.
        return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))

    environment = Environment(
        loader=FileSystemLoader(_LAB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["source"] = source
    environment.filters["data"] = data
    return environment.get_template(template).render(**values)
