"""Say what one chunk size and prompt length gave, in a line."""

from __future__ import annotations

from stem_attn.lab.results import Record


def line(record: Record) -> str:
    """Return the medians of both engines, and what Stem counted."""
    first, later = record["first_token_seconds"], record["next_token_seconds"]
    text = (
        f"{record['length']} tokens in chunks of {record['chunk']}: first token dense {first['dense']:.3f} s, Stem "
        f"{first['stem']:.3f} s, ratio {first['dense'] / first['stem']:.2f}; in the warm-up before, "
        f"{record['warm_up_seconds']['dense']:.3f} and {record['warm_up_seconds']['stem']:.3f} s"
    )
    if later["dense"] is not None:
        text += f"; each token after it {1000 * later['dense']:.2f} and {1000 * later['stem']:.2f} ms"
    return f"{text}; {record['runs']['stem'][0]['stats']}"
