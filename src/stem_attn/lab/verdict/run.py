"""Judge, from what was measured, whether Stem is worth it at every length; the words follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stem_attn.lab.verdict.read import ATTENTION, Accuracy, Evidence, Speed

FASTER = 1.1
"""Dense over Stem from which a prompt is worth the trouble."""
SAME, CLOSE = 0.97, 0.9
"""Shares of the same next tokens: from the first one on the model is called the same, from the second on close."""
POINTS = -1.0
"""Of 100; a task that loses more, beyond chance, has suffered."""
FEWEST_SAMPLES = 8
"""Prompts of a task from which a loss may count as beyond chance."""
_KINDS = ("first token in vLLM", "prefill of a real model", "whole model, random weights", ATTENTION)
_CLOSE_LENGTH = 1.5
_CLOSE_DENSITY = 0.05

YES, PERHAPS, NO, OPEN = "Yes", "Perhaps", "No", "Open"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is said about one length with one set of settings.

    Args:
        answer: `YES`, `PERHAPS`, `NO` or `OPEN`.
        length: Tokens.
        settings: Stem's.
        reason: The numbers, in a sentence.
        cautions: What keeps speed and accuracy from belonging together.
    """

    answer: str
    length: int
    settings: str
    reason: str
    cautions: tuple[str, ...] = ()


def judge(found: Evidence) -> list[Judgement]:
    """Judge every length and settings whose speed is known; without any, those whose accuracy is known."""
    stem = [one for one in found.accuracies if one.is_stem]
    if not found.speeds:
        return [_without_speed(measured) for measured in _alike(stem)]
    best: dict[tuple[str, int], Speed] = {}
    for speed in found.speeds:
        key = speed.settings, speed.length
        if key not in best or _order(speed) < _order(best[key]):
            best[key] = speed
    return [_judge(best[key], stem) for key in sorted(best, key=lambda key: (key[1], key[0]))]


def headline(judgements: Sequence[Judgement]) -> str:
    """Say the verdict in a sentence or two."""
    if not judgements:
        return "Nothing here compares Stem with dense attention."
    words = {
        YES: "Worth it at {}.",
        PERHAPS: "Perhaps worth it at {}: try it on your own task.",
        NO: "Not worth it at {}.",
        OPEN: "Open at {}: something is not measured yet.",
    }
    said = []
    for answer, text in words.items():
        places = [_place(one, judgements) for one in judgements if one.answer == answer]
        if places:
            said.append(text.format(" and ".join(dict.fromkeys(places))))
    return " ".join(said)


def _place(one: Judgement, judgements: Sequence[Judgement]) -> str:
    """Name a length, and the settings too where others have another answer there."""
    there = {other.answer for other in judgements if other.length == one.length}
    return f"{one.length:,} tokens" + (f" with {one.settings}" if len(there) > 1 else "")


def _order(speed: Speed) -> tuple[int, float]:
    """Prefer what is nearest to use; of the same kind, as with several chunk sizes, the least gain."""
    return _KINDS.index(speed.kind), speed.ratio


def _judge(speed: Speed, stem: Sequence[Accuracy]) -> Judgement:
    seconds = f"{_seconds(speed.dense_seconds)}, Stem {_seconds(speed.stem_seconds)}"
    told = f"{speed.kind}: {speed.ratio:.2f} times as fast as dense ({seconds})"
    if speed.ratio < FASTER:
        return Judgement(NO, speed.length, speed.settings, f"{told}.")
    near = [group for one in _kinds(stem) if (group := _nearest(speed, one))]
    if not near:
        ask = "what it does to the answers is not measured: run stem-attn eval fidelity"
        return Judgement(OPEN, speed.length, speed.settings, f"{told}; {ask}.")
    answer, effect = _effect(near)
    if speed.kind == ATTENTION and answer != NO:
        answer = OPEN
        told += ", the rest of the model not counted (run stem-attn bench --ttft or stem-attn serving)"
    return Judgement(answer, speed.length, speed.settings, f"{told}; {effect}.", _cautions(speed, near))


def _without_speed(measured: Sequence[Accuracy]) -> Judgement:
    answer, effect = _effect([measured])
    ask = "what it gains is not measured: run stem-attn bench --ttft or stem-attn serving"
    first = measured[0]
    settings = f"{first.method} at density {first.density:.2f}"
    return Judgement(NO if answer == NO else OPEN, first.length, settings, f"{effect}; {ask}.")


def _alike(stem: Sequence[Accuracy]) -> list[list[Accuracy]]:
    """Put together what is of one length, one method and about one density, in this order."""
    groups: list[list[Accuracy]] = []
    for one in sorted(stem, key=lambda one: (one.length, one.method, one.density)):
        first = groups[-1][0] if groups else None
        same = first is not None and (one.length, one.method) == (first.length, first.method)
        if first is not None and same and one.density - first.density <= _CLOSE_DENSITY:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _kinds(stem: Sequence[Accuracy]) -> list[list[Accuracy]]:
    """Tell predictions from tasks: each kind is judged where it was measured."""
    predictions = [one for one in stem if one.top1_agreement is not None]
    return [predictions, [one for one in stem if one.top1_agreement is None]]


def _nearest(speed: Speed, stem: Sequence[Accuracy]) -> list[Accuracy]:
    """Return what is known of the same settings, if of any, at the nearest length and density.

    What prunes as hard as what was timed, or harder, comes before what prunes less.
    """
    known = [one for one in stem if one.method == speed.settings] or list(stem)
    if not known:
        return []
    density = 0.0 if speed.density is None else speed.density
    as_hard = [one for one in known if one.density <= density + _CLOSE_DENSITY] or known

    def distance(one: Accuracy) -> tuple[float, float]:
        return abs(math.log(one.length / speed.length)), abs(one.density - density)

    best = min(as_hard, key=distance)

    def belongs(one: Accuracy) -> bool:
        same = (one.length, one.method) == (best.length, best.method)
        return same and abs(one.density - best.density) <= _CLOSE_DENSITY

    return [one for one in as_hard if belongs(one)]


def _effect(groups: Sequence[Sequence[Accuracy]]) -> tuple[str, str]:
    """Judge accuracy: the worst of what was measured counts. A group is of one method, length and density."""
    answer, told = YES, []
    for group in groups:
        said = []
        for one in group:
            own, words = _effect_of(one)
            answer = max(answer, own, key=(YES, PERHAPS, NO).index)
            said.append(words)
        first = group[0]
        told.append(f"{', '.join(said)} ({first.method}, {first.length:,} tokens, density {first.density:.3f})")
    return answer, "; ".join(told)


def _effect_of(one: Accuracy) -> tuple[str, str]:
    if one.top1_agreement is not None:
        share = one.top1_agreement
        own = YES if share >= SAME else PERHAPS if share >= CLOSE else NO
        return own, f"the same next token at {share:.1%} of the positions"
    points = one.points or 0.0
    # Too few prompts tell no loss from chance, whatever their interval says.
    enough = one.samples is None or one.samples >= FEWEST_SAMPLES
    beyond_chance = enough and one.interval is not None and one.interval[1] < 0
    own = YES if points >= POINTS else NO if beyond_chance else PERHAPS
    return own, f"{one.kind} {points:+.1f} points against dense"


def _cautions(speed: Speed, groups: Sequence[Sequence[Accuracy]]) -> tuple[str, ...]:
    said = []
    for accuracy, *_ in groups:
        if accuracy.method != speed.settings:
            said.append(f"Accuracy was measured of {accuracy.method}, speed of {speed.settings}.")
        if max(speed.length, accuracy.length) > _CLOSE_LENGTH * min(speed.length, accuracy.length):
            said.append(f"Accuracy was measured at {accuracy.length:,} tokens, speed at {speed.length:,}.")
        if speed.density is not None and abs(speed.density - accuracy.density) > _CLOSE_DENSITY:
            said.append(f"Accuracy was measured at density {accuracy.density:.3f}, speed at {speed.density:.3f}.")
    if speed.kind in (ATTENTION, "whole model, random weights"):
        said.append("Speed was measured on random numbers, not on the model of the accuracy results.")
    return tuple(dict.fromkeys(said))


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
