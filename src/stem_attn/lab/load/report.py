"""Say what two servers did under load: a line a rate, and what follows from all."""

from __future__ import annotations

from collections.abc import Sequence

from stem_attn.lab.load.run import SERVERS, goodput
from stem_attn.lab.results import Record


def line(record: Record) -> str:
    """Return one record in a line; of each number the dense server's, then Stem's."""
    if record["kind"] == "unloaded":
        firsts = [sorted(one[name] for one in record["first_token_seconds"])[1] for name in SERVERS]
        capacity = record["requests_a_second"]
        return (
            f"longest prompt alone: first token {firsts[0]:.3f} and {firsts[1]:.3f} s; all at once: "
            f"{capacity['dense']:.2f} and {capacity['stem']:.2f} requests/s; limit {record['limit']:.2f} s"
        )
    both = [record[name] for name in SERVERS]
    text = f"{record['requests_a_second']:.2f} requests/s" if record["kind"] == "rate" else "short prompts"
    for name in ("p50", "p99"):
        text += f"; first token {name} " + " and ".join(f"{one['first_token_seconds'][name] or 0:.3f}" for one in both)
    text += " s; each later token " + " and ".join(f"{1000 * (one['next_token_seconds'] or 0):.1f}" for one in both)
    text += " ms; within the limit " + " and ".join(f"{one['within_limit']:.1%}" for one in both)
    text += "; lost " + " and ".join(f"{len(one['lost'])} of {one['requests']}" for one in both)
    if "differ" in record:
        found = record["differ"]
        text += (
            f"; of {found['compared']} answers {found['differ']} differ, {found['by_more_than_rounding']} by more than "
            "rounding"
        )
    return text


def summary(records: Sequence[Record]) -> str:
    """Return the goodputs and what follows at the dense server's."""
    best = [goodput(records, name) for name in SERVERS]
    if best[0] is None or best[1] is None:
        return f"goodput: {best[0]} and {best[1]} requests/s"
    at = next(r for r in records if r["kind"] == "rate" and r["requests_a_second"] == best[0])
    p99 = [at[name]["first_token_seconds"]["p99"] for name in SERVERS]
    text = (
        f"goodput: {best[0]:.2f} and {best[1]:.2f} requests/s, ratio {best[1] / best[0]:.2f}; at the dense server's, "
    )
    if p99[1] is None:
        return f"{text}Stem's answers nothing"
    return f"{text}first token p99 {p99[0]:.3f} and {p99[1]:.3f} s, ratio {p99[1] / p99[0]:.2f}"
