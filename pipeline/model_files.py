"""Model files: where they come from, what identifies them, and how a node gets them.

A model is a hub id, a local directory, a `.gguf` file or an object-store URL of a directory.
``resolve`` finds it and says what identifies its weights; ``local_directory`` brings it onto this
node, once, under a file lock. Weights are safetensors or GGUF.
"""

import hashlib
import os
import platform
import tempfile
from fnmatch import fnmatch
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import listing, storage
from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.model_cache import HASHES, file_sha256, make_once
from pipeline.settings import ModelRef
from pipeline.storage_faults import reading

CONVERSION_VERSION = 2
_DESCRIPTION_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_FETCHED = (".safetensors", *(pattern.removeprefix("*") for pattern in _DESCRIPTION_FILES))


def resolve(config: ModelConfig) -> ModelRef:
    """Find the model and identify its weights, without loading them.

    Raises:
        ModelError: There is no such model, it has no safetensors, or it is not the one pinned.
    """
    path = os.path.expanduser(config.path)
    cache_dir = os.path.expanduser(config.cache_dir or "~/.cache/cherry")
    if "://" in path:
        ref = ModelRef(path.rstrip("/"), "url", _url_fingerprint(path), cache_dir)
    elif path.endswith(".gguf"):
        if not os.path.isfile(path):
            raise ModelError(f"model.path {path}: there is no such file.")
        digest = file_sha256(path, cache_dir)
        ref = ModelRef(os.path.abspath(path), "gguf", f"sha256:{digest}", cache_dir)
    elif os.path.isdir(path):
        digest = _directory_sha256(path, cache_dir)
        ref = ModelRef(os.path.abspath(path), "directory", f"sha256:{digest}", cache_dir)
    elif path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelError(
            f"model.path {path}: there is no such directory. Expected a directory, a .gguf file, "
            "an object-store URL, or a hub id such as HuggingFaceTB/SmolLM2-135M."
        )
    else:
        return ModelRef(path, "hub", f"commit:{_hub_commit(path, config.revision)}", cache_dir)
    if config.revision is not None and config.revision != ref.fingerprint:
        raise ModelError(
            f"model.path {path}: got {ref.fingerprint}, expected model.revision "
            f"{config.revision}. It is another model than the one pinned."
        )
    return ref


def local_directory(ref: ModelRef, *, weights: bool = True) -> str:
    """A safetensors directory of the model on this node; fetched or converted once per node.

    Args:
        ref: From `resolve`.
        weights: False brings only config and tokenizer, where they come apart.
    """
    if ref.kind == "directory":
        _check_here(ref)
        if weights and (digest := _directory_sha256(ref.path, ref.cache_dir)) != _digest(ref):
            raise ModelError(
                f"model.path {ref.path}: got sha256:{digest} on this node, expected "
                f"{ref.fingerprint}. Put the same files there on every node, or use a URL."
            )
        return ref.path
    if ref.kind == "hub":
        return _hub_snapshot(ref, weights)
    digest = _digest(ref)
    if ref.kind == "gguf":
        name = f"gguf{CONVERSION_VERSION}-{digest[:32]}"
        return make_once(ref.cache_dir, name, lambda into: _convert_gguf(ref, into))
    name = f"url-{digest[:32]}" + ("" if weights else "-description")
    return make_once(ref.cache_dir, name, lambda into: _download(ref, into, weights))


def description_files(directory: str) -> list[str]:
    """Names of the files that describe a model and its tokenizer: all but weights."""
    return [
        name
        for name in sorted(os.listdir(directory))
        if name != HASHES and any(fnmatch(name, pattern) for pattern in _DESCRIPTION_FILES)
    ]


def _check_here(ref: ModelRef) -> None:
    if not os.path.exists(ref.path):
        raise ModelError(
            f"model.path {ref.path}: it is not on node {platform.node()}. Put it there on every "
            "node, or use a URL."
        )


def _digest(ref: ModelRef) -> str:
    return ref.fingerprint.partition(":")[2]


def _directory_sha256(path: str, cache_dir: str) -> str:
    names = sorted(os.listdir(path))
    weights = [n for n in names if n.endswith(".safetensors")]
    if "config.json" not in names or not weights:
        raise ModelError(
            f"model.path {path}: expected config.json and *.safetensors, has: "
            f"{', '.join(names) or 'nothing'}. Convert other weights with save_pretrained()."
        )
    digest = hashlib.sha256()
    for name in ["config.json", *weights]:
        digest.update(f"{name}:{file_sha256(os.path.join(path, name), cache_dir)}\n".encode())
    return digest.hexdigest()


def _files_at(url: str) -> list[listing.ObjectInfo]:
    """What lies directly under a URL: checkpoints and exports below it are other models."""
    base = storage.filesystem(url)[1].rstrip("/")
    entries = listing.list_objects(url, globs=False)
    return [e for e in entries if storage.filesystem(e.url)[1].rpartition("/")[0] == base]


def _url_fingerprint(url: str) -> str:
    entries = _files_at(url)
    names = [entry.url.rpartition("/")[2] for entry in entries]
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"model.path {url}: expected config.json and *.safetensors, has: "
            f"{', '.join(names) or 'nothing'}."
        )
    facts = [
        f"{name}:{entry.size}:{entry.version}"
        for name, entry in zip(names, entries, strict=True)
        if name.endswith(_FETCHED)
    ]
    return "etags:" + hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _hub_commit(name: str, revision: str | None) -> str:
    directory = _hub_download(name, revision, _DESCRIPTION_FILES)
    return os.path.basename(directory)  # the hub's cache names a snapshot by its commit


def _hub_snapshot(ref: ModelRef, weights: bool) -> str:
    patterns = [*_DESCRIPTION_FILES, *(["*.safetensors"] if weights else [])]
    return _hub_download(ref.path, ref.fingerprint.partition(":")[2], patterns)


def _hub_download(name: str, revision: str | None, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        if isinstance(err, HfHubHTTPError) and err.response.status_code in (401, 403):
            reason += " If it is gated or private: accept its terms on the hub, and set HF_TOKEN."
        raise ModelError(
            f"model.path {name}: there is no such directory here, and the hub does not give a "
            f"model of this name (revision {revision or 'main'}): {reason}"
        ) from err


def _convert_gguf(ref: ModelRef, into: str) -> None:
    """Dequantise to float32 safetensors: a GGUF takes half a minute to load, this 0.1 s."""
    _check_here(ref)
    if (digest := file_sha256(ref.path, ref.cache_dir)) != _digest(ref):
        raise ModelError(
            f"model.path {ref.path}: got sha256:{digest} on node {platform.node()}, expected "
            f"{ref.fingerprint}. Put the same file there on every node, or use a URL."
        )
    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": os.path.basename(ref.path)}
    try:
        with tempfile.TemporaryDirectory(prefix="cherry-gguf-") as alone:
            # A tokenizer.json beside it, of whatever model, would be taken for its own.
            os.symlink(ref.path, os.path.join(alone, source["gguf_file"]))
            tokenizer = AutoTokenizer.from_pretrained(alone, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **source)
    except ImportError as err:
        raise ModelError(
            f"model.path {ref.path}: reading GGUF needs an extra: "
            f"pip install 'cherry-pipeline[gguf]' ({err})"
        ) from err
    except (OSError, ValueError, KeyError) as err:
        raise ModelError(f"model.path {ref.path}: cannot be read as GGUF: {err}") from err
    # save_pretrained refuses a model that remembers being quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _download(ref: ModelRef, into: str, weights: bool) -> None:
    _check_unchanged(ref)
    fs, _ = storage.filesystem(ref.path)
    for entry in _files_at(ref.path):
        name = entry.url.rpartition("/")[2]
        if not name.endswith(_FETCHED) or (name.endswith(".safetensors") and not weights):
            continue
        target = os.path.join(into, name)
        with reading(entry.url):
            fs.get_file(entry.url, target)
        if os.path.getsize(target) != entry.size:
            raise ModelError(
                f"model.path {entry.url}: got {os.path.getsize(target):,} bytes, "
                f"expected {entry.size:,}."
            )
    _check_unchanged(ref)  # while it was fetched


def _check_unchanged(ref: ModelRef) -> None:
    if _url_fingerprint(ref.path) != ref.fingerprint:
        raise ModelError(
            f"model.path {ref.path}: its files changed since this run began. Run again, and put a "
            "new model beside one that is in use, not over it."
        )
