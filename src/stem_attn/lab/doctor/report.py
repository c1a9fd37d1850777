"""Show what works here, what does not, and the verdict."""

from __future__ import annotations

from rich.console import Group
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from stem_attn.lab import machine
from stem_attn.lab.results import Record
from stem_attn.lab.tables import narrow_table, within_columns


def render(found: Record) -> Constrain:
    """Return what the terminal shows.

    Args:
        found: The record that `stem-attn doctor --json` writes.
    """
    parts = (*found["backends"], *found["integrations"])
    return within_columns(Group(_facts(found["machine"]), Text(), _checks(parts), Text(), *_words(parts)))


def _facts(where: Record) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("machine", machine.in_words(where))
    facts.add_row("system", f"{where['platform']}, {where['cpu']}, {where['cpu_count']} processors")
    versions = {"python": where["python"], **where["versions"]}
    facts.add_row("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    return facts


def _checks(parts: tuple[Record, ...]) -> Table:
    words, numbers = ("", "device", "dtype", ""), ("error", "allowed", "density", "seconds")
    table = narrow_table("Checked against float64", words, numbers)
    for part in parts:
        for check in part["checks"]:
            if check["not_taken"]:
                continue
            verdict = Text("WRONG", style="red") if check["wrong"] else Text("right", style="green")
            forms = {"error": ".1e", "allowed": ".1e", "density": ".2f", "seconds": ".1f"}
            cells = ["-" if check[name] is None else format(check[name], form) for name, form in forms.items()]
            table.add_row(part["name"], check["device"], check["dtype"], verdict, *cells)
    return table


def _words(parts: tuple[Record, ...]) -> list[Text]:
    lines = []
    for part in parts:
        if part["why_not"]:
            lines.append(Text(f"{part['name']} is not available here: {part['why_not']}"))
        elif not part["checks"]:
            lines.append(Text(f"{part['name']} is available; it is not checked here"))
        if part["how"]:
            lines.append(Text(f"{part['name']} runs {part['how']}"))
        for check in part["checks"]:
            if check["not_taken"]:
                lines.append(Text(f"{part['name']} does not take {check['dtype']} here: {check['not_taken']}"))
    wrong = [(part["name"], check) for part in parts for check in part["checks"] if check["wrong"]]
    lines += [Text(f"{name}, {check['dtype']}: {check['wrong']}", style="red") for name, check in wrong]
    verdict = "Something that is available here is wrong." if wrong else "All that is available here is right."
    return [*lines, Text(), Text(verdict, style="bold red" if wrong else "bold green")]
