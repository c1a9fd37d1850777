"""Turn what was found into numbers, a sentence, and the files of `stem-attn inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stem_attn import plots
from stem_attn.lab import machine, web
from stem_attn.lab.inspect.pack import packed, thumbnails
from stem_attn.lab.inspect.pictures import draw
from stem_attn.lab.inspect.run import STEPS, Found
from stem_attn.lab.results import Record, to_json

SAME_TOKEN: tuple[tuple[float, str], ...] = (
    (0.995, "it did not matter"),
    (0.97, "it hardly mattered"),
    (0.9, "it mattered a little"),
    (0.0, "it mattered"),
)
"""What is said where at least this share of the positions has the same most likely next token."""


def numbers(found: Found, names: Sequence[str]) -> Record:
    """Return everything but the blocks as plain values.

    Args:
        found: What was found.
        names: Of the methods.
    """
    return {
        "k_blocks": found.grid.k_blocks,
        "shown_rows": found.rows,
        "other_calls": found.other_calls,
        "dense_attention_seconds": sum(layer.dense_seconds for layer in found.layers),
        "methods": [_method(found, i, name) for i, name in enumerate(names)],
        "layers": [
            {
                "layer": layer.index,
                "dense_seconds": layer.dense_seconds,
                "methods": [
                    {
                        "method": name,
                        "density": _mean(kept.density),
                        "lost": _mean(kept.lost_by_head),
                        "error": kept.error,
                        "selection_seconds": outcome.selection_seconds[layer.index],
                        "attention_seconds": outcome.attention_seconds[layer.index],
                        "density_by_head": kept.density,
                        "lost_by_head": kept.lost_by_head,
                    }
                    for name, kept, outcome in zip(names, layer.kept, found.outcomes, strict=True)
                ],
            }
            for layer in found.layers
        ],
    }


def sentence(record: Record) -> str:
    """Say what was pruned and whether it mattered."""
    return "; ".join(_pruned(one) for one in record["methods"]) + "."


def contents(record: Record, found: Found, texts: Sequence[str]) -> dict[str, str | bytes]:
    """Return the files by name, the record first.

    Args:
        record: The numbers and what they were measured with.
        found: The blocks.
        texts: Of every block.
    """
    return {"inspect.json": to_json(record), "inspect.html": page(record, found, texts), **draw(record, found)}


def page(record: Record, found: Found, texts: Sequence[str]) -> str:
    """Return the page; see `contents`."""
    shown, blobs = packed(found)
    worst = max(record["methods"], key=lambda one: one["worst"]["lost"])["worst"]
    data = {
        "layers": [layer["layer"] for layer in record["layers"]],
        "heads": len(record["layers"][0]["methods"][0]["lost_by_head"]),
        "rows": shown.rows,
        "columns": found.grid.k_blocks,
        "blockSize": found.grid.block_size,
        "tokens": found.grid.k_len,
        "steps": STEPS,
        "leastMass": plots.LEAST_MASS,
        "methods": [one["name"] for one in record["methods"]],
        "density": _by_method(record, "density_by_head"),
        "lost": _by_method(record, "lost_by_head"),
        "start": [worst["layer"], worst["head"]],
        "thumbnails": thumbnails(shown),
        "texts": list(texts),
    }
    return web.render(
        "inspect/page.html",
        record=record,
        sentence=sentence(record),
        machine=machine.in_words(record["machine"]),
        thresholds=SAME_TOKEN,
        rows_on_page=len(shown.rows),
        data=data,
        blobs=blobs,
    )


def _method(found: Found, place: int, name: str) -> Record:
    outcome = found.outcomes[place]
    lost = {
        (layer.index, head): value
        for layer in found.layers
        for head, value in enumerate(layer.kept[place].lost_by_head)
    }
    worst = max(lost, key=lambda key: lost[key])
    return {
        "name": name,
        "density": outcome.density,
        "lost": _mean(lost.values()),
        "worst": {"layer": worst[0], "head": worst[1], "lost": lost[worst]},
        "top1_agreement": outcome.top1_agreement,
        "mean_kl_nats": outcome.mean_kl_nats,
        "sparse_layers": outcome.sparse_layers,
        "forward_seconds": outcome.forward_seconds,
        "selection_seconds": sum(outcome.selection_seconds.values()),
        "attention_seconds": sum(outcome.attention_seconds.values()),
        "rest_seconds": outcome.rest_seconds,
    }


def _pruned(one: Record) -> str:
    if one["density"] == 1:
        return f"{one['name']} pruned nothing: its budget holds every block of this prompt"
    said = next(words for least, words in SAME_TOKEN if one["top1_agreement"] >= least)
    return (
        f"{one['name']} pruned {1 - one['density']:.1%} of the blocks and with them {one['lost']:.1%} of the "
        f"attention, and {said}: at {one['top1_agreement']:.1%} of the positions the model predicts the same next token"
    )


def _by_method(record: Record, field: str) -> list[list[list[float]]]:
    """Return a number of every method, layer and head, to six digits."""
    return [
        [[round(value, 6) for value in layer["methods"][i][field]] for layer in record["layers"]]
        for i in range(len(record["methods"]))
    ]


def _mean(values: Iterable[Any]) -> float:
    listed = list(values)
    return float(sum(listed)) / len(listed)
