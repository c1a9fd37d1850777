"""What the plugin uses of vLLM, and whether a vLLM has it: told by its source files, without importing them.

    python -m stem_attn.integrations.vllm.interface vllm-0.33.0-....whl > extract.json

writes what a wheel offers of it, so that a version can be judged where it is not installed.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Members = Mapping[str, list[str] | None]
"""Names within a module or a class; of functions, their parameters without `self`, as `*args` and `**kwargs` too."""
Offer = Mapping[str, Members]
"""Members by owner: a module, `package.module:`, or a class, `package.module:Class`."""

_ATTENTION = "vllm.v1.attention.backend"
_FLASH = "vllm.v1.attention.backends.flash_attn"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_LAYER_ARGUMENTS = (
    "num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, "
    "attn_type, kv_sharing_target_layer_name, sinks"
)
_LAYER = ("head_size", "scale", "kv_cache_dtype", "logits_soft_cap", "sinks")
_FORWARD = "layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale"
_BUILD = "common_prefix_len, common_attn_metadata, fast_build"
_BUILDER = "kv_cache_spec, layer_names, vllm_config, device"

# An owner, and what is used of it: `name`; `name(a, b)`: called with these arguments; `=name(a, b)`: overridden, so
# that its parameters must be these and no others. `A.b or C.d`: one of two owners' members.
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "everywhere": {
        "vllm.version:": ("__version__",),
        "vllm.config:": ("get_layers_from_vllm_config", "get_current_vllm_config", "get_current_vllm_config_or_none"),
        "vllm.config.vllm:VllmConfig": (
            "attention_config",
            "additional_config",
            "device_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
        "vllm.config.attention:AttentionConfig": ("backend", "backend_per_kind"),
        "vllm.config.model:ModelConfig": (
            "dtype",
            "get_head_size()",
            "get_total_num_hidden_layers()",
            "max_model_len",
            "rswa_window",
        ),
        "vllm.config.parallel:ParallelConfig": ("use_ubatching", "decode_context_parallel_size"),
        "vllm.config.scheduler:SchedulerConfig": ("max_num_batched_tokens",),
        "vllm.config.device:DeviceConfig": ("device_type",),
        "vllm.logger:": ("init_logger(name)",),
        "vllm.logger:_VllmLogger": ("info_once", "warning_once"),
        "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": ("impl",),
        "vllm.platforms:": ("current_platform",),
        "vllm.platforms.interface:Platform": ("is_cpu()", "is_cuda()"),
        "vllm.v1.kv_cache_interface:FullAttentionSpec": (),
        "vllm.v1.kv_cache_interface:AttentionSpec": ("num_kv_heads", "head_size"),
        "vllm.v1.kv_cache_interface:KVCacheSpec": ("block_size",),
        "vllm.v1.attention.backends.registry:": ("register_backend(backend, class_path)",),
        "vllm.v1.attention.backends.registry:AttentionBackendEnum": (
            "CUSTOM",
            "CPU_ATTN",
            "get_path()",
            "is_overridden()",
        ),
        f"{_ATTENTION}:AttentionType": ("DECODER",),
        f"{_ATTENTION}:AttentionMetadataBuilder": (
            "kv_cache_spec",
            "vllm_config",
            "device",
            "reorder_batch_threshold",
            "supports_update_block_table",
            "=build_for_cudagraph_capture(common_attn_metadata)",
            "_init_reorder_batch_threshold(reorder_batch_threshold, supports_spec_as_decode)",
        ),
        f"{_ATTENTION}:AttentionCGSupport": ("UNIFORM_BATCH",),
        f"{_ATTENTION}:CommonAttentionMetadata": (
            "block_table_tensor",
            "causal",
            "is_prefilling",
            "max_query_len",
            "mm_req_doc_ranges",
            "num_actual_tokens",
            "num_reqs",
            "positions",
            "query_start_loc",
            "query_start_loc_cpu",
            "replace(num_reqs)",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "slot_mapping",
            "req_idx or vllm.v1.worker.gpu.input_batch:InputBatch.idx_mapping_np",
        ),
    },
    "cuda": {
        f"{_FLASH}:FlashAttentionBackend": ("=get_name()", "=get_impl_cls()", "=get_builder_cls()"),
        f"{_FLASH}:FlashAttentionImpl": (f"=__init__({_LAYER_ARGUMENTS})", f"=forward({_FORWARD})", *_LAYER),
        f"{_FLASH}:FlashAttentionMetadata": ("block_table",),
        f"{_FLASH}:FlashAttentionMetadataBuilder": (
            f"=__init__({_BUILDER})",
            f"=build({_BUILD})",
            "_cudagraph_support",
            "num_heads_q",
        ),
        "vllm.model_executor.layers.attention.attention:": ("_q_scale", "_k_scale", "_v_scale"),  # of fp8 caches
    },
    "cpu": {
        f"{_CPU}:CPUAttentionBackend": ("=get_impl_cls()", "=get_builder_cls()"),
        f"{_CPU}:CPUAttentionBackendImpl": (f"=__init__({_LAYER_ARGUMENTS})", f"=forward({_FORWARD})", *_LAYER),
        f"{_CPU}:CPUAttentionMetadata": ("block_table",),
        f"{_CPU}:CPUAttentionMetadataBuilder": (
            f"=__init__({_BUILDER})",
            f"=build({_BUILD})",
            f"_set_isa_to_layers or {_CPU}:CPUAttentionBackendImpl.isa",
        ),
        "vllm._custom_ops:": ("cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa)",),
    },
    # How long a request's prompt is, by the runner that the engine has. Without it prefill is budgeted less well.
    "V1 runner": {
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
            "input_batch",
            "parallel_config",
            "requests",
            "execute_model(scheduler_output)",
        ),
        "vllm.v1.worker.gpu_input_batch:InputBatch": ("num_prompt_tokens", "num_reqs", "req_ids"),
        "vllm.v1.worker.gpu_input_batch:CachedRequestState": ("sampling_params",),
    },
    "V2 runner": {
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner": ("req_states", "execute_model(scheduler_output)"),
        "vllm.v1.worker.gpu.states:RequestState": ("prompt_len", "prefill_len", "index_to_req_id", "req_id_to_index"),
    },
    # What a request asks for; without it requests have the server's settings.
    "requests": {
        "vllm.config.model:ModelConfig": ("logits_processors",),
        "vllm.config.cache:CacheConfig": ("enable_prefix_caching",),
        "vllm.config.vllm:VllmConfig": ("cache_config",),
        "vllm.sampling_params:SamplingParams": ("extra_args",),
        "vllm.v1.core.sched.output:SchedulerOutput": ("scheduled_new_reqs",),
        "vllm.v1.core.sched.output:NewRequestData": ("req_id", "sampling_params"),
        "vllm.v1.engine.input_processor:InputProcessor": ("vllm_config", "process_inputs(prompt, params)"),
        "vllm.v1.sample.logits_processor.interface:LogitsProcessor": (
            "=validate_params(sampling_params)",
            "=apply(logits)",
            "=is_argmax_invariant()",
            "=update_state(batch_update)",
        ),
    },
}
PARTS = tuple(_PARTS)


def missing(offer: Offer, parts: Sequence[str] = PARTS) -> list[str]:
    """Name what a vLLM lacks of what the plugin uses.

    Args:
        offer: What it has, from `read_offer`.
        parts: Of these parts of it.

    Returns:
        A line each; none if it has everything.
    """
    found = []
    for owner, wanted in _wanted(parts):
        members = offer.get(owner)
        if members is None:
            found.append(f"{owner.rstrip(':')} is gone")
            continue
        for want in wanted:
            reasons = [_lack(offer, *place) for place in _places(owner, want)]
            if all(reasons):
                found.append(" and ".join(str(reason) for reason in reasons))
    return found


def read_offer(root: Path | zipfile.Path, parts: Sequence[str] = PARTS) -> dict[str, dict[str, list[str] | None]]:
    """Read what a vLLM has of what the plugin uses.

    Args:
        root: The folder or the wheel that holds the package `vllm`.
        parts: Of these parts of it.

    Returns:
        An offer, of the members that are asked for; an owner that it does not have is not in it.
    """
    names: dict[str, set[str]] = {}
    for owner, wanted in _wanted(parts):
        names.setdefault(owner, set())
        for place, want in (pair for one in wanted for pair in _places(owner, one)):
            names.setdefault(place, set()).add(_parse(want)[1])
    modules: dict[str, ast.Module | None] = {}
    offer = {}
    for owner in sorted(names):
        module, _, class_name = owner.partition(":")
        if module not in modules:
            modules[module] = _module(root, module)
        body = _body(modules[module], class_name)
        if body is not None:
            members = _members(body, in_class=bool(class_name))
            offer[owner] = {name: members[name] for name in sorted(names[owner]) if name in members}
    return offer


def _wanted(parts: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in parts:
        yield from _PARTS[part].items()


def _places(owner: str, want: str) -> list[tuple[str, str]]:
    """Return the owner and the member of each alternative."""
    first, *others = want.split(" or ")
    return [(owner, first), *((place, name) for place, _, name in (other.rpartition(".") for other in others))]


def _parse(want: str) -> tuple[bool, str, list[str] | None]:
    """Return whether a member is overridden, its name, and its arguments, None where it is not called."""
    told = re.fullmatch(r"(=?)(\w+)(?:\((.*)\))?", want)
    assert told, want
    arguments = None if told[3] is None else [name for name in told[3].split(", ") if name]
    return bool(told[1]), told[2], arguments


def _lack(offer: Offer, owner: str, want: str) -> str | None:
    """Say what is wrong with one member, or return None."""
    overridden, name, arguments = _parse(want)
    where = f"{owner}.{name}" if not owner.endswith(":") else f"{owner[:-1]}.{name}"
    members = offer.get(owner)
    if members is None or name not in members:
        return f"{where} is gone"
    has = members[name]
    if arguments is None or has is None:  # a property, an imported name
        return None
    if overridden:
        return None if has == arguments else f"{where} takes ({', '.join(has)}), not ({', '.join(arguments)})"
    absent = [] if any(name.startswith("**") for name in has) else [name for name in arguments if name not in has]
    return f"{where} takes no {', '.join(absent)}" if absent else None


def _module(root: Path | zipfile.Path, module: str) -> ast.Module | None:
    path = module.replace(".", "/")
    for name in (f"{path}.py", f"{path}/__init__.py"):
        file = root / name
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _body(module: ast.Module | None, class_name: str) -> list[ast.stmt] | None:
    """Return the statements of a module or of one of its classes."""
    if module is None or not class_name:
        return None if module is None else module.body
    return next((x.body for x in module.body if isinstance(x, ast.ClassDef) and x.name == class_name), None)


def _members(body: list[ast.stmt], *, in_class: bool) -> dict[str, list[str] | None]:
    found: dict[str, list[str] | None] = {}
    for statement in _flat(body):
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.update({} if not in_class else dict.fromkeys(_set_on_self(statement)))
            found.update(dict.fromkeys(_buffers(statement)))
            found[statement.name] = _parameters(statement, in_class)
        else:
            found.update(dict.fromkeys(_assigned(statement)))
    return found


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, of `if` and `try` all branches."""
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try)):
            handlers = statement.handlers if isinstance(statement, ast.Try) else []
            yield from _flat([*statement.body, *(x for handler in handlers for x in handler.body), *statement.orelse])
        else:
            yield statement


def _assigned(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement defines."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (name.asname or name.name for name in statement.names)
    elif isinstance(statement, ast.ClassDef):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name))


def _set_on_self(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _buffers(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the names of the buffers that a function registers on a module, its own or another one."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "register_buffer":
            yield from (x.value for x in node.args[:1] if isinstance(x, ast.Constant) and isinstance(x.value, str))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> list[str] | None:
    decorators = {x.id for x in function.decorator_list if isinstance(x, ast.Name)}
    if "property" in decorators:
        return None
    given = function.args
    names = [x.arg for x in (*given.posonlyargs, *given.args)]
    names = names[1:] if in_class and "staticmethod" not in decorators else names
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [x.arg for x in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(json.dumps(read_offer(path if path.is_dir() else zipfile.Path(path)), indent=1))
