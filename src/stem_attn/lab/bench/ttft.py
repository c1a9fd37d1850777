"""Time to first token of a whole model with random weights: dense SDPA against Stem through the adapter."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem_attn.config import StemConfig
from stem_attn.lab.gate import GateError
from stem_attn.lab.progress import OnStep
from stem_attn.lab.results import Record
from stem_attn.lab.shapes import MODELS
from stem_attn.policy import PrefillPolicy

_CHECK_TOKENS = 1024
_FACTOR = 2.0  # of the difference between two dense kernels


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A model with random weights, and what it is called in the report."""

    name: str
    module: Any
    layers: int
    vocab_size: int
    device: torch.device


def build_model(
    shape: str, layers: int | None, longest: int, dtype: torch.dtype, device: torch.device, seed: int
) -> RandomModel:
    """Make a model of a named shape with random weights on the device; nothing is downloaded.

    Args:
        shape: A name from `MODELS`.
        layers: Decoder layers instead of the shape's own number.
        longest: Tokens of the longest prompt.
        dtype: Of weights and activations.
        device: Where it lives.
        seed: Of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(MODELS[shape])
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    config = AutoConfig.for_model(fields.pop("model_type"), max_position_embeddings=max(longest, 2048), **fields)
    torch.manual_seed(seed)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    count = fields["num_hidden_layers"]
    return RandomModel(f"{shape} shape, {count} layers, random weights", module, count, fields["vocab_size"], device)


@torch.inference_mode()
def check_adapter(model: RandomModel, config: StemConfig, seed: int) -> Record:
    """Check that the adapter with every block kept gives the dense logits, before anything is timed.

    The last position's logits may differ from the fused dense kernel's by twice what torch's unfused kernel does, or
    by one rounding of their dtype where those two agree more closely than that. Products are in the model's dtype: what
    8 bits lose is no fault of the adapter.

    Raises:
        GateError: They differ more, or the adapter did not attend sparsely.
    """
    from stem_attn.integrations import hf

    tokens = _tokens(model, 1, _CHECK_TOKENS, seed)
    with _dense_kernel(model.device):
        dense = _last_logits(model, tokens)
    with sdpa_kernel(SDPBackend.MATH):
        unfused = _last_logits(model, tokens)
    everything = replace(config, budget_ratio=1.0, budget_scale=1.0, precision="auto")
    hf.enable(model.module, everything, policy=PrefillPolicy(min_seq_len=0, crossover=False))
    try:
        kept = _last_logits(model, tokens)
        sparse = hf.stats(model.module).sparse
    finally:
        hf.disable(model.module)
    found = float((kept - dense).norm() / dense.norm())
    allowed = max(_FACTOR * float((unfused - dense).norm() / dense.norm()), torch.finfo(model.module.dtype).eps)
    if sparse != model.layers:
        raise GateError(f"the adapter ran {sparse} of {model.layers} layers")
    if not found <= allowed:  # NaN fails
        raise GateError(f"with every block kept the logits differ from dense by {found:.2e}, allowed {allowed:.2e}")
    return {"tokens": _CHECK_TOKENS, "difference": found, "allowed": allowed}


@torch.inference_mode()
def measure(
    model: RandomModel,
    config: StemConfig,
    policy: PrefillPolicy,
    length: int,
    *,
    batch: int,
    rounds: int,
    seed: int,
    on_step: OnStep,
) -> Record:
    """Time one prefill, dense and sparse by turns.

    Args:
        model: From `build_model`.
        config: The method's settings.
        policy: Which layers and prompts are sparse.
        length: Tokens of a prompt.
        batch: Prompts.
        rounds: Measurements of each; one more of each warms up and is not counted.
        seed: Of the prompt.
        on_step: Told what starts: once a prefill.

    Raises:
        GateError: The logits are not finite.
    """
    from stem_attn.integrations import hf

    tokens = _tokens(model, batch, length, seed)
    times: dict[str, list[float]] = {"dense": [], "stem": []}
    peaks: dict[str, list[float]] = {"dense": [], "stem": []}
    stats = None
    for r in range(rounds + 1):
        for name in ("dense", "stem"):
            on_step(f"{length} tokens, {name}, " + (f"round {r}" if r else "warm-up"))
            if name == "stem":
                hf.enable(model.module, config, policy=policy)
            try:
                with _dense_kernel(model.device):
                    seconds, peak, logits = _timed(model, tokens)
                stats = hf.stats(model.module) if name == "stem" else stats
            finally:
                if name == "stem":
                    hf.disable(model.module)
            if not bool(logits.isfinite().all()):
                raise GateError(f"{name}: the logits are not finite")
            if r:
                times[name].append(seconds)
            if r and peak is not None:
                peaks[name].append(peak)
    assert stats is not None
    record: Record = {
        name: {
            "s": {"median": statistics.median(t), "min": min(t), "max": max(t), "samples": t},
            "peak_gib": max(peaks[name]) if peaks[name] else None,
        }
        for name, t in times.items()
    }
    return {
        "k_len": length,
        **record,
        "speedup": record["dense"]["s"]["median"] / record["stem"]["s"]["median"],
        "density": stats.density,
        "sparse_layers": stats.sparse,
        "dense_reasons": stats.dense,
    }


def _timed(model: RandomModel, tokens: Tensor) -> tuple[float, float | None, Tensor]:
    """Prefill once; return wall-clock seconds, peak device memory in GiB (None on a CPU), and the logits."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    start = time.perf_counter()
    logits = _last_logits(model, tokens)
    if on_gpu:
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(model.device) / 2**30 if on_gpu else None, logits


def _last_logits(model: RandomModel, tokens: Tensor) -> Tensor:
    """Return the last position's logits; the cache is filled as before decoding."""
    logits: Tensor = model.module(tokens, use_cache=True, logits_to_keep=1).logits
    return logits


def _tokens(model: RandomModel, batch: int, length: int, seed: int) -> Tensor:
    gen = torch.Generator(model.device).manual_seed(seed)
    return torch.randint(model.vocab_size, (batch, length), generator=gen, device=model.device)


@contextlib.contextmanager
def _dense_kernel(device: torch.device) -> Iterator[None]:
    """Hold dense attention to cuDNN on a GPU, the fastest that torch has; the layers that Stem leaves dense too."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else contextlib.nullcontext():
        yield
