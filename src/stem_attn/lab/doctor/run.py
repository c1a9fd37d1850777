"""Look at every backend and integration: whether it works here, and whether what it computes is right."""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stem_attn import backends, stem_attention
from stem_attn.backends.base import Backend
from stem_attn.blocks import BlockSelection
from stem_attn.call import Call
from stem_attn.checks import resolve_scale
from stem_attn.config import StemConfig
from stem_attn.lab.devices import DTYPES, synchronize
from stem_attn.lab.errors import first_line
from stem_attn.lab.gate import GateError, Sample, check_selection
from stem_attn.lab.results import Record
from stem_attn.layout import Layout
from stem_attn.reference import reference_attention

# Small blocks are quicker; 128 is what every backend takes. About half of the causal blocks are pruned.
_CONFIGS = [StemConfig(block_size=size, budget_ratio=0.3, budget_bias=1, tail_blocks=1) for size in (32, 128)]
_BLOCKS, _REST = 15, 20  # whole blocks, and the tokens of the last one
_HEADS, _KV_HEADS, _HEAD_DIM, _SEED = 4, 2, 64, 0
_ALIKE_TOKENS = 24
_FACTOR = 2.0  # of what torch's own attention loses
_MODEL_TOKENS = 300
_MODEL_ERROR = 1e-9  # in float64, relative to the largest logit

SETTINGS: Record = {
    "heads": _HEADS,
    "kv_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "seed": _SEED,
    "configs": [json.loads(config.to_json()) for config in _CONFIGS],
}


def examine_backends() -> list[Record]:
    """Check every backend on a few hundred tokens.

    Returns:
        A record each: its name, `why_not` where it is not available here, `how` it runs if there are several ways, and
        `checks`, one a dtype.
    """
    return [
        {
            "name": name,
            "why_not": reason,
            "how": None if reason else backends.by_name(name).how(),
            "checks": [] if reason else [_check(backends.by_name(name), dtype) for dtype in DTYPES],
        }
        for name, reason in backends.available().items()
    ]


def examine_integrations() -> list[Record]:
    """Look at the adapters in the same form; vLLM's is not run, since that takes an engine."""
    reasons = {"transformers": _why_no_transformers(), "vllm": _why_no_vllm()}
    checks = {"transformers": [] if reasons["transformers"] else [_check_model()], "vllm": []}
    return [{"name": name, "why_not": reason, "how": None, "checks": checks[name]} for name, reason in reasons.items()]


def is_wrong(found: Record) -> bool:
    """Tell whether something that is available failed its check."""
    return any(check["wrong"] for part in (*found["backends"], *found["integrations"]) for check in part["checks"])


def _check(backend: Backend, dtype_name: str) -> Record:
    """Compare a backend's selection and output with float64.

    Its blocks may differ from those that float64 scores keep only where scores tie within rounding.
    """
    device = _device_of(backend)
    for config in _CONFIGS:
        tokens = _BLOCKS * config.block_size + _REST
        q, k, v = _inputs(tokens, DTYPES[dtype_name], device)
        call = Call(Layout.dense(q, k, v, None), config.block_size, resolve_scale(None, _HEAD_DIM))
        reason = backend.why_unsupported(call)
        if reason is None:
            break
    if backend.name == "triton" and device.type == "cpu" and dtype_name == "bfloat16":
        reason = "Triton's interpreter has no bfloat16 products"  # what selects blocks it can run
    check: Record = {"device": device.type, "dtype": dtype_name, "not_taken": reason}
    check |= {"tokens": tokens, "block_size": config.block_size}
    check |= {"seconds": None, "density": None, "error": None, "allowed": None, "wrong": None}
    if check["not_taken"]:
        return check
    start = time.perf_counter()
    try:
        out, selection = stem_attention(q, k, v, config=config, backend=backend.name, return_selection=True)
        synchronize(device)
        check["density"] = selection.density()
        check["error"], check["allowed"], check["wrong"] = _compare(q, k, v, selection, out)
        check_selection(q, k, v, selection, config, [Sample(0, 0, tuple(range(0, tokens, config.block_size)))])
    except GateError as error:
        check["wrong"] = str(error)
    except Exception as error:  # whatever a compiler or a driver says is what the report is for
        check["wrong"] = f"{type(error).__name__}: {first_line(error)}"
    check["seconds"] = time.perf_counter() - start
    return check


def _compare(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, out: Tensor
) -> tuple[float, float, str | None]:
    """Compare an output with float64 attention over the same blocks.

    Errors are relative to the root mean square of their row. Twice what torch's own attention loses is allowed.

    Returns:
        The error and what is allowed, root mean squares, and what is wrong, if anything is.
    """
    size, tokens = selection.block_size, q.shape[2]
    exact, _ = reference_attention(q, k, v, selection.to_mask(), size, scale=resolve_scale(None, _HEAD_DIM))
    block = torch.arange(tokens, device=q.device) // size
    kept = selection.to_mask()[:, :, block][..., block].tril()
    k, v = (x.repeat_interleave(_HEADS // _KV_HEADS, 1) for x in (k, v))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    unit = exact.square().mean(-1, keepdim=True).sqrt()
    found, lost = (((x.double().cpu() - exact) / unit).abs() for x in (out, dense))
    (most, mean), (most_lost, mean_lost) = ((float(x.max()), float(x.square().mean().sqrt())) for x in (found, lost))
    right = most <= _FACTOR * most_lost and mean <= _FACTOR * mean_lost  # NaN is not
    wrong = f"error max {most:.1e}, rms {mean:.1e} against float64; torch's own {most_lost:.1e}, {mean_lost:.1e}"
    return mean, _FACTOR * mean_lost, None if right else wrong


def _device_of(backend: Backend) -> torch.device:
    """Return where a backend is at home."""
    on_gpu = torch.cuda.is_available() and "*" not in backend.automatic_on
    return torch.device("cuda" if on_gpu else "cpu")


def _inputs(tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v with some structure, so that a wrong choice of blocks shows: neighbours are alike."""
    gen = torch.Generator().manual_seed(_SEED)

    def runs(heads: int, dim: int) -> Tensor:
        drawn = torch.randn(1, heads, -(-tokens // _ALIKE_TOKENS), dim, generator=gen)
        return drawn.repeat_interleave(_ALIKE_TOKENS, 2)[:, :, :tokens]

    def draw(heads: int) -> Tensor:
        own = torch.randn(1, heads, tokens, _HEAD_DIM, generator=gen)
        return (runs(heads, _HEAD_DIM) + own) / 2**0.5

    q, k, v = draw(_HEADS), draw(_KV_HEADS), draw(_KV_HEADS) * (runs(_KV_HEADS, 1) / 2).exp()
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def _why_no_transformers() -> str | None:
    if find_spec("transformers") is None:
        return 'the package transformers is not installed (pip install "stem-attn[hf]")'
    try:
        import stem_attn.integrations.hf  # noqa: F401
    except Exception as error:  # an installation that is broken, or of another version
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _check_model() -> Record:
    """Compare a tiny model in float64: with every block kept it must give the dense logits, and sparsely run at all."""
    check: Record = {"device": "cpu", "dtype": "float64", "not_taken": None, "density": None}
    check |= {"error": None, "allowed": _MODEL_ERROR, "wrong": None}
    start = time.perf_counter()
    try:
        check["error"], check["density"], sparse = _run_model()
        if not check["error"] <= _MODEL_ERROR:  # NaN fails
            check["wrong"] = f"with every block kept the logits differ from dense by {check['error']:.1e}"
        elif not sparse:
            check["wrong"] = "no layer ran sparse"
    except Exception as error:
        check["wrong"] = f"{type(error).__name__}: {first_line(error)}"
    check["seconds"] = time.perf_counter() - start
    return check


@torch.inference_mode()
def _run_model() -> tuple[float, float | None, int]:
    """Return the largest difference of logits with every block kept, and a sparse run's density and sparse layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from stem_attn.integrations import hf
    from stem_attn.policy import PrefillPolicy

    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96}
    policy = PrefillPolicy(min_seq_len=0, crossover=False)
    small = StemConfig(block_size=32, budget_ratio=0.2, budget_bias=1, tail_blocks=1)
    everything = StemConfig(block_size=32, budget_ratio=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(LlamaConfig(**shape)).double().eval()
        tokens = torch.randint(97, (1, _MODEL_TOKENS))
    dense = model(tokens).logits
    try:
        hf.enable(model, everything, policy=policy, backend="cpu")
        difference = (model(tokens).logits - dense).abs().max() / dense.abs().max()
        hf.enable(model, small, policy=policy, backend="cpu")
        model(tokens)
        stats = hf.stats(model)
    finally:
        hf.disable(model)
    return float(difference), stats.density, stats.sparse


def _why_no_vllm() -> str | None:
    if find_spec("vllm") is None:
        return 'the package vllm is not installed (pip install "stem-attn[vllm]")'
    try:
        from stem_attn.integrations.vllm import compat
    except Exception as error:  # an installation that is broken
        return f"{type(error).__name__}: {first_line(error)}"
    reason = compat.why_unsupported("cuda" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        return reason
    if not any(point.name == "stem" for point in entry_points(group="vllm.general_plugins")):
        return "this package's plugin is not registered: install the package, a folder on PYTHONPATH is not enough"
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "stem" not in plugins.split(","):
        return "VLLM_PLUGINS is set, and stem is not in it"
    return None
