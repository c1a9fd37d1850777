"""Run tasks: the same prompts under every method, one prefill each, answers decoded densely."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import product
from typing import Any

import torch
import transformers
from torch import Tensor

from stem_attn.lab import machine
from stem_attn.lab.answers import Prefilled, decode, end_tokens, force, read_prompt, together
from stem_attn.lab.configs import plain_settings
from stem_attn.lab.devices import name_of
from stem_attn.lab.equal_density import UnreachableDensityError
from stem_attn.lab.errors import InputError
from stem_attn.lab.models import LoadedModel
from stem_attn.lab.named_methods import NamedMethod
from stem_attn.lab.results import Record
from stem_attn.lab.tasks.registry import TASKS
from stem_attn.lab.tasks.samples import Frame, Request, Sample
from stem_attn.lab.tasks.sparse import Kept, running
from stem_attn.lab.tasks.store import Store
from stem_attn.lab.tasks.task import Task
from stem_attn.methods import Stem

_CPU_CACHE_BYTES = 2**30  # of the methods' caches that are continued together
_CUDA_CACHE_SHARE = 1 / 16  # of the device's memory, so that several processes fit
_MARK = "\N{REPLACEMENT CHARACTER}"  # where a chat template puts the user's words
_RECORD_VERSION = 2  # of what a record holds


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run.

    Args:
        tasks: Names.
        lengths: Tokens of prompt and answer together.
        samples: Which prompts of each task and length, in the order to run.
        methods: Each runs every prompt. The first is dense attention, to which the others are compared.
        block_size: Tokens a block, unless a method says otherwise.
        density: Kept over causal blocks that every method is brought to in every layer; None: each method's own budget.
        chat: Whether prompts are put into the model's chat format, where their task lets them.
        seed: Of the prompts.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: tuple[int, ...]
    methods: tuple[NamedMethod, ...]
    block_size: int
    density: float | None
    chat: bool
    seed: int


@dataclass(slots=True)
class Results:
    """What a run found.

    Args:
        records: One of every task, length, method and sample.
        left_out: By method and length, why it could not run.
        stopped: Whether the run was told to stop before its end.
    """

    records: list[Record] = field(default_factory=list)
    left_out: dict[tuple[str, int], str] = field(default_factory=dict)
    stopped: bool = False


OnPrompt = Callable[[str], None]
"""Told what is done, once for every prompt and method."""


def evaluate(
    loaded: LoadedModel, settings: Settings, store: Store, on_prompt: OnPrompt, stop: Callable[[], bool] = lambda: False
) -> Results:
    """Answer and score every prompt whose answer the store does not have yet.

    A sample of every task is finished before the next one is begun, so that a run that stops has about as many of each.

    Args:
        loaded: The model.
        settings: What to run.
        store: Where answers are kept.
        on_prompt: Told what is done.
        stop: Asked before every prompt whether to stop there.

    Raises:
        InputError: A task does not fit a length, the model's attention cannot be routed, or a stored answer is one to
            another prompt.
    """
    runner = _Runner(loaded, settings, store, on_prompt)
    prompts = [_Prompts(loaded, settings, task, length) for length in settings.lengths for task in settings.tasks]
    for index, made in product(settings.samples, prompts):
        if stop():
            runner.results.stopped = True
            break
        runner.answer(made, index)
    results = runner.results
    results.records = [r for r in results.records if (r["method"], r["length"]) not in results.left_out]
    return results


def chat_frame(tokenizer: Any) -> Frame:
    """Return what a tokenizer's chat template puts around a user's words."""
    messages = [{"role": "user", "content": _MARK}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = chat.partition(_MARK)
    return Frame(before, after)


def fingerprint(model: Any) -> str:
    """Return a short hash of a model's configuration and of the first numbers of every weight."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Prompts:
    """The prompts of one task and length, made when first needed; the same ones for every method."""

    def __init__(self, loaded: LoadedModel, settings: Settings, task: str, length: int) -> None:
        self.task = TASKS[task]
        self.task_name = task
        self.length = length
        self.name = f"{task} at {length}"
        self.chat = settings.chat and self.task.chat
        self.sources = self.task.sources() if self.task.sources is not None else []
        self._tokenizer = loaded.tokenizer
        self._device = loaded.model.device
        frame = chat_frame(self._tokenizer) if self.chat else Frame()
        self._request = Request(length, settings.seed, frame, self._count)
        self._coming: Iterator[Sample] | None = None
        self._made = 0

    def sample(self, index: int) -> Sample:
        """Return a sample; one after an earlier one costs no more than those between them."""
        if self._coming is None or index < self._made:
            self._coming, self._made = self.task.samples(self._request), 0
        while self._made < index:
            next(self._coming)
            self._made += 1
        self._made += 1
        return next(self._coming)

    def ids(self, sample: Sample) -> Tensor:
        """Return a prompt's tokens, int64 [1, T]; a chat format brings its own special tokens."""
        ids = self._tokenizer(sample.prompt, add_special_tokens=not self.chat).input_ids
        return torch.tensor([ids], device=self._device)

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A prompt as one method read it.

    Args:
        place: The method's place among the methods.
        prefilled: The model's cache and first logits.
        kept: What was attended to.
    """

    place: int
    prefilled: Prefilled
    kept: Kept


class _Runner:
    """Answers prompts under every method, and keeps what they say.

    Attributes:
        results: What was found so far.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, store: Store, on_prompt: OnPrompt) -> None:
        self.results = Results()
        self._loaded = loaded
        self._settings = settings
        self._store = store
        self._on_prompt = on_prompt
        where = machine.in_words(machine.describe(loaded.model.device))
        self._machine = f"{where}, transformers {transformers.__version__}"
        self._key = {
            "record": _RECORD_VERSION,
            "model": loaded.name,
            "weights": fingerprint(loaded.model),
            "dtype": name_of(loaded.model.dtype),
            "device": loaded.model.device.type,
            "seed": settings.seed,
        }

    def answer(self, prompts: _Prompts, index: int) -> None:
        """Find every method's record of one prompt; those that are missing are made, and stored as they come."""
        methods = self._settings.methods
        place = {"chat": prompts.chat, "task": prompts.task_name, "length": prompts.length, "index": index}
        keys = [{**self._key, **place, "method": _method_settings(named, self._settings)} for named in methods]
        found = {i: record for i, key in enumerate(keys) if (record := self._store.get(key)) is not None}
        missing = [i for i in range(len(keys)) if i not in found]
        sample = prompts.sample(index) if missing else None
        _check_same_prompt(prompts, index, sample, found.values())
        for i in found:
            self._on_prompt(f"{prompts.name} {methods[i].name}")
        if sample is not None:
            for group in self._readings(prompts, sample, missing):
                dense = found[0]["answer_ids"] if 0 in found else None
                for reading, answer in zip(group, self._answers(prompts.task, group, dense), strict=True):
                    found[reading.place] = {
                        "key": keys[reading.place],
                        "name": methods[reading.place].name,
                        "machine": self._machine,
                        **_scored(prompts, sample, answer["answer"]),
                        **answer,
                    }
                self._store.add(found[reading.place] for reading in group)
        self.results.records += [
            {**record, **record["key"], "method": methods[i].name} for i, record in sorted(found.items())
        ]

    def _readings(self, prompts: _Prompts, sample: Sample, places: list[int]) -> Iterator[list[_Reading]]:
        """Prefill one prompt under methods, and yield as many readings as may be continued together."""
        model, left_out = self._loaded.model, self.results.left_out
        ids, room = prompts.ids(sample), _cache_bytes(model.device)
        group: list[_Reading] = []
        for place in places:
            named = self._settings.methods[place]
            if (named.name, prompts.length) in left_out:
                continue
            try:
                with running(model, named, self._settings.block_size, self._settings.density) as kept:
                    group.append(_Reading(place, read_prompt(model, ids), kept()))
            except UnreachableDensityError as error:
                left_out[named.name, prompts.length] = str(error)
                continue
            self._on_prompt(f"{prompts.name} {named.name}")
            used = sum(reading.prefilled.cache_bytes() for reading in group)
            if used * (len(group) + 1) / len(group) > room:
                yield group
                group = []
        if group:
            yield group

    def _answers(self, task: Task, group: list[_Reading], dense: list[int] | None) -> list[Record]:
        """Return what the readings of one prompt say, and how likely they make dense attention's answer.

        Args:
            task: The prompt's.
            group: The readings; their caches are used up.
            dense: Dense attention's answer; None: the first reading is dense.
        """
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        batches = together([reading.prefilled for reading in group], task.new_tokens)
        written = [ids for batch in batches for ids in decode(model, batch, task.new_tokens)]
        forced = written[0] if dense is None else dense
        likely = [each.log_probability for batch in batches for each in force(model, batch, forced)]
        ends = end_tokens(model)
        return [
            {
                "answer": tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True),
                "answer_ids": ids,
                "dense_answer_log_probability": value,
                "budget": reading.kept.budget,
                "layers": reading.kept.layers,
            }
            for reading, ids, value in zip(group, written, likely, strict=True)
        ]


def _method_settings(named: NamedMethod, settings: Settings) -> Record:
    """Return everything that a method's answers depend on, its name aside."""
    if named.base == "dense":
        return {"base": "dense"}
    method = named.build(settings.block_size)
    described = plain_settings(method.config, named.policy) if isinstance(method, Stem) else _plain(method)
    return {"base": named.base, "density": settings.density, **described}


def _plain(value: Any) -> Any:
    """Return a dataclass as plain values, without what it works out for itself: a hash differs between processes."""
    if not is_dataclass(value):
        return value
    return {item.name: _plain(getattr(value, item.name)) for item in fields(value) if item.init}


def _check_same_prompt(prompts: _Prompts, index: int, sample: Sample | None, stored: Iterable[Record]) -> None:
    """Refuse answers to another prompt than what the other methods had, or what is made now."""
    hashes = {record["prompt_sha256"] for record in stored} | ({sample.sha256} if sample is not None else set())
    if len(hashes) > 1:
        raise InputError(
            f"the --out file has an answer to another prompt of {prompts.name}, sample {index}: the tokenizer, a text "
            f"that prompts are made of, or this package has changed; use another file"
        )


def _scored(prompts: _Prompts, sample: Sample, answer: str) -> Record:
    """Return what a record says of a prompt, and of an answer to it."""
    measures = {"score": prompts.task.score, **prompts.task.also}
    return {
        "sources": prompts.sources,
        "prompt_sha256": sample.sha256,
        "prompt_tokens": sample.prompt_tokens,
        "references": sample.references,
        **{name: measure(answer, sample.references) for name, measure in measures.items()},
    }


def _cache_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] * _CUDA_CACHE_SHARE
    return _CPU_CACHE_BYTES
