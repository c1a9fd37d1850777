"""Say what two servers did under load: a line a trial, and what follows from all."""

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
    text = "short prompts"
    if record["kind"] != "short":
        text = " and ".join(f"{record['requests_a_second'][name]:.2f}" for name in SERVERS) + " requests/s"
    for name in ("p50", "p99"):
        text += f"; first token {name} " + " and ".join(f"{one['first_token_seconds'][name] or 0:.3f}" for one in both)
    text += " s; each later token " + " and ".join(f"{1000 * (one['next_token_seconds'] or 0):.1f}" for one in both)
    text += " ms; within the limit " + " and ".join(f"{one['within_limit']:.1%}" for one in both)
    text += "; lost " + " and ".join(f"{len(one['lost'])} of {one['requests']}" for one in both)
    if "differ" in record:
        found, own = record["differ"], record["dense_from_itself"]
        text += (
            f"; of {found['compared']} answers {found['differ']} differ, {found['by_more_than_rounding']} by more than "
            f"rounding; asked again, the dense server differs from itself in {own['differ']} of {own['compared']}, "
            f"{own['by_more_than_rounding']} by more"
        )
    return text


def summary(records: Sequence[Record]) -> str:
    """Return the goodputs and what follows at the dense server's."""
    best = [goodput(records, name) for name in SERVERS]
    if best[0] is None or best[1] is None:
        return f"goodput: {best[0]} and {best[1]} requests/s"
    text = f"goodput: {best[0]:.2f} and {best[1]:.2f} requests/s, ratio {best[1] / best[0]:.2f}"
    both = next((record for record in records if record["kind"] == "rate"), None)
    if both is None:  # a run that was cut
        return text
    p99 = [both[name]["first_token_seconds"]["p99"] for name in SERVERS]
    if None in p99:
        return f"{text}; at the dense server's, one answers nothing"
    return (
        f"{text}; at the dense server's, first token p99 {p99[0]:.3f} and {p99[1]:.3f} s, ratio {p99[1] / p99[0]:.2f}"
    )
