"""Switch a model to Stem and back, and ask what it did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor
from transformers import PreTrainedModel

from stem_attn import backends, methods
from stem_attn.checks import resolve_config
from stem_attn.config import StemConfig, field_names
from stem_attn.integrations.hf.configs import exchange, give_back, take_own
from stem_attn.integrations.hf.counters import Stats
from stem_attn.integrations.hf.refuse import calls_interface, layer_count, why_refused
from stem_attn.integrations.hf.register import NAME, make_known
from stem_attn.integrations.hf.state import ATTRIBUTE, State
from stem_attn.integrations.hf.told import normalize, telling
from stem_attn.method import Method, check_attention
from stem_attn.methods import Stem
from stem_attn.methods.uniform import Uniform
from stem_attn.policy import PrefillPolicy

_DEFAULT = StemConfig()
Model = TypeVar("Model", bound=PreTrainedModel)


def enable(
    model: Model,
    config: StemConfig | str = "default",
    *,
    policy: PrefillPolicy | None = None,
    method: Method | str | None = None,
    prompt_len: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Model:
    """Route a model's prefill through Stem or another method; decode and all that is not covered stay dense.

    Enabling again replaces the settings and starts new counts. Of a model with several towers only the text tower
    changes.

    Args:
        model: A transformers model.
        config: Stem's settings, or a preset's name. With another method only `residual` and `precision` may
            differ from the default: the rest is the method's own, `block_size` too. (`"uniform"` takes all of it.)
        policy: Which prompts and layers are sparse. Default: the preset's, or `PrefillPolicy()` beside a `StemConfig`.
            Its `crossover` holds for Stem only, whose density is known in advance: other methods always run sparse
            from `min_seq_len` tokens on.
        method: What selects the blocks instead of Stem: a name from `stem_attn.methods.METHODS`, with its published
            defaults, or an instance, for instance from `methods.make(name, ...)`. A `Stem` brings its own config.
        prompt_len: Tokens of the whole prompt, padding not counted: one int or one a batch row. Tell it, or use
            `prompt_length`, when the prompt comes in chunks; otherwise chunks are budgeted by what they see.
        backend: `"auto"` or a name from `stem_attn.backends.available()`.

    Returns:
        The same model.

    Raises:
        ValueError: The model's attention cannot be routed (the reason is given), or an argument is wrong. The model
            is then as it was before.
        RuntimeError: The named backend is not available here. Likewise.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}{_inner_model_hint(model)}"
        )
    preset, config = config, resolve_config(config)
    if policy is None:
        policy = PrefillPolicy.preset(preset) if isinstance(preset, str) else PrefillPolicy()
    if not isinstance(policy, PrefillPolicy):
        raise ValueError(f"policy must be a PrefillPolicy, got {type(policy).__name__}")
    config, selector = _resolve_method(config, method, backend)
    if selector is not None and policy.layer_budgets:
        raise ValueError(f"policy.layer_budgets has no effect on method {method!r}: only Stem has budgets by layer")
    if backend != "auto":
        backends.by_name(backend)  # which refuses what cannot run here
    lengths = normalize(prompt_len)
    reason = why_refused(model, policy)
    if reason:
        raise ValueError(f"{type(model).__name__} cannot run with stem: {reason}")

    make_known()
    old = vars(model).get(ATTRIBUTE)
    if old is None:
        disable(model)  # parts of it may be enabled on their own
        swap = take_own(model)
    else:
        swap = old.swap
        exchange(model, swap)  # parts of it may be new
    try:
        model.set_attn_implementation(_target(model))
        switched = [m for m in model.modules() if _implementation(m) == NAME]
        if not switched:
            raise ValueError("transformers did not accept the attention implementation")
        kinds = {type(m) for m in switched if calls_interface(type(m))}
        for name, module in model.named_modules():
            if type(module) in kinds and _implementation(module) != NAME:
                raise ValueError(f"{name} has a config object of its own: give it the model's")
    except Exception as error:
        if old is None:
            give_back(model, swap, NAME)
        raise ValueError(f"{type(model).__name__} cannot run with stem: {error}") from error
    state = State(config, policy, lengths, backend, selector, swap, layer_count(model))
    for module in (model, *switched):
        setattr(module, ATTRIBUTE, state)
    return model


# How wrappers give their model: PEFT, torch.compile, DataParallel and DistributedDataParallel, pipelines.
_WAYS_IN = ("get_base_model", "_orig_mod", "module", "model")


def _inner_model_hint(wrapper: Any) -> str:
    for way in _WAYS_IN:
        inner = getattr(wrapper, way, None)
        if isinstance(inner, PreTrainedModel):
            return f": enable the model inside, which is its .{way}"
        if way == "get_base_model" and callable(inner):
            return ": enable the model inside, which is its .get_base_model()"
    return ""


def _resolve_method(config: StemConfig, method: Any, backend: str) -> tuple[StemConfig, Method | None]:
    """Return the config, and what selects instead of Stem; refuse settings that nothing would read."""
    if method is None or method == "stem":
        return config, None
    if isinstance(method, Stem):
        if config not in (_DEFAULT, method.config):
            raise ValueError("method is a Stem, which brings its own config: pass one of method and config")
        if method.backend not in ("auto", backend):
            raise ValueError(f"method names the backend {method.backend!r}, but backend is {backend!r}")
        return method.config, None
    if method == "uniform":
        return config, Uniform(config=config)
    others = [f for f in field_names() if f not in ("residual", "precision")]
    ignored = [f for f in others if getattr(config, f) != getattr(_DEFAULT, f)]
    if ignored:
        raise ValueError(
            f"config.{ignored[0]} has no effect on method {method!r}: with a method, config gives residual and "
            "precision only; set the method's own fields with methods.make(name, ...)"
        )
    if isinstance(method, str):
        return config, methods.make(method)
    if not callable(getattr(method, "select", None)) or not isinstance(getattr(method, "block_size", None), int):
        raise ValueError(f"method must be a name or have block_size and select(q, k, v), got {type(method).__name__}")
    check_attention(method, config)
    return config, cast(Method, method)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`: every part of the model gets its attention implementation back. Otherwise do nothing."""
    states = [module.__dict__.pop(ATTRIBUTE, None) for module in model.modules()]
    for state in {id(state): state for state in states if state is not None}.values():
        give_back(model, state.swap, NAME)


def stats(model: PreTrainedModel) -> Stats:
    """Return what the attention calls of an enabled model were.

    Raises:
        ValueError: The model is not enabled.
    """
    state = _state(model)
    return state.counters.stats("stem" if state.method is None else methods.name_of(state.method))


def reset_stats(model: PreTrainedModel) -> None:
    """Start counting anew.

    Raises:
        ValueError: The model is not enabled.
    """
    _state(model).counters.reset()


@contextlib.contextmanager
def prompt_length(model: PreTrainedModel, prompt_len: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Tell the whole prompt's length while its chunks run, for instance around `generate(prefill_chunk_size=...)`.

    The last chunk, however short, then counts as prefill; a chunk of a single token stays dense.

    The length holds for what runs in the block: calls in the same thread, async tasks started in the block, and threads
    started in it. A worker of a pool that is already running is none of these: give it the block's context with
    `pool.submit(contextvars.copy_context().run, model.generate, ...)`. Other threads keep their own lengths.

    Args:
        model: An enabled model.
        prompt_len: Tokens, padding not counted: one int or one a batch row.

    Raises:
        ValueError: The model is not enabled, or the length is not a positive int.
    """
    with telling(_state(model).key, normalize(prompt_len)):
        yield


def _state(model: PreTrainedModel) -> State:
    state = getattr(model, ATTRIBUTE, None)
    if not isinstance(state, State):
        raise ValueError(f"{type(model).__name__} is not enabled: call enable(model) first")
    return state


def _target(model: PreTrainedModel) -> str | dict[str, str]:
    """Return what to pass to `set_attn_implementation` so that only the text tower changes."""
    text = model.config.get_text_config()
    if text is model.config:
        return NAME
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is text:
            return {key: NAME}
    raise ValueError("its text model is nested too deeply: enable the part that holds the text model")


def _implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)
