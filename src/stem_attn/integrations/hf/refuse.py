"""Which models cannot run with Stem, and why."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel

from stem_attn.policy import PrefillPolicy

# Models that declare no SDPA support because of softcap or sinks, and that were seen to match their eager attention.
_CHECKED_WITHOUT_SDPA = frozenset(
    {"flint", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "vaultgemma"}
)


def why_refused(model: PreTrainedModel, policy: PrefillPolicy) -> str | None:
    """Say why a model's attention cannot be routed, as the end of a sentence, or return None."""
    text = model.config.get_text_config()
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config.get_text_config() is m.config]
    for part in [model, *parts]:
        if not part._can_set_attn_implementation():
            return f"{type(part).__name__} does not call its attention through transformers' attention interface"
    if any(name.rpartition(".")[2] == "indexer" for name, _ in model.named_modules()):
        return "it has trained sparse attention (an indexer), which Stem would replace"
    if not any(_calls_interface(kind) for kind in {type(m) for m in model.modules()}):
        return "it has no attention layers that call the attention interface"
    if not all(part._supports_sdpa for part in parts) and text.model_type not in _CHECKED_WITHOUT_SDPA:
        return f"{text.model_type} does not support SDPA, to which dense calls go"
    try:
        policy.check_layers(text.num_hidden_layers)
    except ValueError as error:
        return str(error)
    return None


def _calls_interface(kind: type) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # no source, for instance of a class defined in a session
        return False
