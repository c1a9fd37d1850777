"""Run RULER: the same prompts under every method, one prefill each, answers decoded densely."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from stem_attn.lab.configs import plain_settings
from stem_attn.lab.devices import name_of
from stem_attn.lab.equal_density import UnreachableDensityError
from stem_attn.lab.errors import InputError
from stem_attn.lab.models import LoadedModel
from stem_attn.lab.named_methods import NamedMethod
from stem_attn.lab.ruler.generate import Prefilled, decode, read_prompt
from stem_attn.lab.ruler.samples import Frame, Request, Sample
from stem_attn.lab.ruler.scoring import score
from stem_attn.lab.ruler.sparse import Kept, running
from stem_attn.lab.ruler.store import Store
from stem_attn.lab.ruler.tasks import TASKS
from stem_attn.methods import Stem

_CPU_CACHE_BYTES = 2**30  # of the prompts whose answers are decoded together
_CUDA_CACHE_SHARE = 1 / 8  # of the memory that is free then
_MARK = "\N{REPLACEMENT CHARACTER}"  # where a chat template puts the user's words


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run.

    Args:
        tasks: Names.
        lengths: Tokens of prompt and answer together.
        samples: Prompts of each task and length.
        methods: Each runs every prompt.
        block_size: Tokens a block, unless a method says otherwise.
        density: Kept over causal blocks that every method is brought to in every layer; None: each method's own budget.
        chat: Whether prompts are put into the model's chat format.
        seed: Of the prompts.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    methods: tuple[NamedMethod, ...]
    block_size: int
    density: float | None
    chat: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Results:
    """What a run found.

    Args:
        records: One of every task, length, method and sample.
        left_out: By method and length, why it could not run.
    """

    records: list[dict[str, Any]]
    left_out: dict[tuple[str, int], str]


OnPrompt = Callable[[str], None]
"""Told what is done, once for every prompt and method."""


def evaluate(loaded: LoadedModel, settings: Settings, store: Store, on_prompt: OnPrompt) -> Results:
    """Answer and score every prompt whose answer the store does not have yet.

    Args:
        loaded: The model.
        settings: What to run.
        store: Where answers are kept.
        on_prompt: Told what is done.

    Raises:
        InputError: A task does not fit a length, the model's attention cannot be routed, or a stored answer is one to
            another prompt.
    """
    shared = {
        "model": loaded.name,
        "weights": fingerprint(loaded.model),
        "dtype": name_of(loaded.model.dtype),
        "device": loaded.model.device.type,
        "chat": settings.chat,
        "seed": settings.seed,
    }
    results = Results([], {})
    for length in settings.lengths:
        for task in settings.tasks:
            prompts = _Prompts(loaded.tokenizer, settings, task, length)
            for named in settings.methods:
                if (named.name, length) in results.left_out:
                    continue
                place = {"method": _method_settings(named, settings), "task": task, "length": length}
                keys = [{**shared, **place, "index": index} for index in range(settings.samples)]
                on_done = partial(on_prompt, f"{task} {length} {named.name}")
                try:
                    records = _records(loaded, settings, named, prompts, keys, store, on_done)
                except UnreachableDensityError as error:
                    results.left_out[named.name, length] = str(error)
                    continue
                results.records.extend({**record, **record["key"], "method": named.name} for record in records)
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

    def __init__(self, tokenizer: Any, settings: Settings, task: str, length: int) -> None:
        self.new_tokens = TASKS[task].new_tokens
        self.name = f"{task} at {length}"
        self._tokenizer = tokenizer
        self._settings = settings
        self._task = task
        self._length = length
        self._sha256: dict[int, str] = {}

    @cached_property
    def samples(self) -> list[Sample]:
        frame = chat_frame(self._tokenizer) if self._settings.chat else Frame()
        request = Request(self._length, self._settings.seed, frame, self._count)
        return list(islice(TASKS[self._task].samples(request), self._settings.samples))

    def ids(self, index: int) -> Tensor:
        """Return a prompt's tokens, int64 [1, T]; a chat format brings its own special tokens."""
        prompt = self.samples[index].prompt
        return torch.tensor([self._tokenizer(prompt, add_special_tokens=not self._settings.chat).input_ids])

    def sha256(self, index: int) -> str:
        return hashlib.sha256(self.samples[index].prompt.encode()).hexdigest()

    def check(self, index: int, sha256: str) -> None:
        """Refuse an answer to another prompt than what the other methods had, or what would be made now."""
        made = "samples" in self.__dict__
        expected = self._sha256.setdefault(index, self.sha256(index) if made else sha256)
        if sha256 != expected:
            raise InputError(
                f"the --out file has an answer to another prompt of {self.name}, sample {index}: the tokenizer, the "
                f"essays' text or this package has changed; use another file"
            )

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)


def _method_settings(named: NamedMethod, settings: Settings) -> dict[str, Any]:
    """Return everything that a method's answers depend on, its name aside."""
    if named.base == "dense":
        return {"base": "dense"}
    method = named.build(settings.block_size)
    fields = plain_settings(method.config, named.policy) if isinstance(method, Stem) else asdict(cast(Any, method))
    return {"base": named.base, "density": settings.density, **fields}


def _records(
    loaded: LoadedModel,
    settings: Settings,
    named: NamedMethod,
    prompts: _Prompts,
    keys: list[dict[str, Any]],
    store: Store,
    on_done: Callable[[], None],
) -> list[dict[str, Any]]:
    """Return one method's records of one task and length; those that were missing are stored as they come."""
    missing = deque(index for index, key in enumerate(keys) if store.get(key) is None)
    for _ in range(len(keys) - len(missing)):
        on_done()
    room = _cache_bytes(loaded.model.device)
    while missing:
        batch: list[tuple[int, Prefilled, Kept]] = []
        with running(loaded.model, named, settings.block_size, settings.density) as kept:
            while missing and sum(read.cache_bytes() for _, read, _ in batch) < room:
                read = read_prompt(loaded.model, prompts.ids(missing[0]).to(loaded.model.device))
                batch.append((missing.popleft(), read, kept()))
                on_done()
        answers = decode(loaded.model, [read for _, read, _ in batch], prompts.new_tokens)
        store.add(
            _record(
                keys[index],
                prompts.samples[index],
                prompts.sha256(index),
                kept,
                loaded.tokenizer.decode(answer, skip_special_tokens=True),
            )
            for (index, _, kept), answer in zip(batch, answers, strict=True)
        )
    records = [cast(dict[str, Any], store.get(key)) for key in keys]
    for index, record in enumerate(records):
        prompts.check(index, record["prompt_sha256"])
    return records


def _record(key: dict[str, Any], sample: Sample, sha256: str, kept: Kept, answer: str) -> dict[str, Any]:
    return {
        "key": key,
        "prompt_sha256": sha256,
        "prompt_tokens": sample.prompt_tokens,
        "references": sample.references,
        "answer": answer,
        "score": score(answer, sample.references),
        "budget": kept.budget,
        "layers": kept.layers,
    }


def _cache_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * _CUDA_CACHE_SHARE
    return _CPU_CACHE_BYTES
