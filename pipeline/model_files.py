"""Model files: where they come from, what identifies them, and how a node gets them.

A model is a hub id, a local directory, a `.gguf` file or an object-store URL of a directory.
``resolve`` finds it and says what identifies its weights; ``local_directory`` brings it onto this
node, once, under a file lock. Weights are safetensors or GGUF.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import listing, storage
from pipeline.config import ModelConfig
from pipeline.errors import CherryError, ModelError
from pipeline.settings import ModelRef
from pipeline.storage_faults import reading

log = logging.getLogger("cherry")

CONVERSION_VERSION = 2
_HASHES = "cherry_hashes.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_DESCRIPTION_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_FETCHED = (".safetensors", ".json", ".txt", ".model", ".jinja")


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
        digest = _file_sha256(path, cache_dir)
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
        return _once(ref.cache_dir, name, lambda into: _convert_gguf(ref, into))
    name = f"url-{digest[:32]}" + ("" if weights else "-description")
    return _once(ref.cache_dir, name, lambda into: _download(ref, into, weights))


def description_files(directory: str) -> list[str]:
    """Names of the files that describe a model and its tokenizer: all but weights."""
    return [
        name
        for name in sorted(os.listdir(directory))
        if name != _HASHES and any(fnmatch(name, pattern) for pattern in _DESCRIPTION_FILES)
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
        digest.update(f"{name}:{_file_sha256(os.path.join(path, name), cache_dir)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: str, cache_dir: str) -> str:
    """Content hash, remembered by path, size, inode and times: hashing 14 GB takes a while."""
    path = os.path.realpath(path)
    stat = os.stat(path)
    seen = f"{path}:{stat.st_size}:{stat.st_ino}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    key = hashlib.sha256(seen.encode()).hexdigest()
    memo = Path(cache_dir, "hashes", key)
    with suppress(OSError):
        if len(known := memo.read_text()) == 64:
            return known
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    with suppress(OSError):  # no room for it, or no right to write: it is hashed again
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_suffix(f".{uuid.uuid4().hex}.tmp")  # containers may share pids
        temporary.write_text(digest)
        temporary.replace(memo)
    return digest


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
    listing = [
        f"{name}:{entry.size}:{entry.version}"
        for name, entry in zip(names, entries, strict=True)
        if name.endswith(_FETCHED)
    ]
    return "etags:" + hashlib.sha256("\n".join(listing).encode()).hexdigest()


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


def _once(cache_dir: str, name: str, make: Callable[[str], None]) -> str:
    """Make a directory in the cache, whole or not at all, by one process of the node.

    Its files' hashes are recorded; a directory that no longer has them is made again.
    """
    final = Path(cache_dir, "models", name)
    with _locked(final.with_suffix(".lock")):
        if final.is_dir() and not _intact(final, cache_dir):
            log.warning("%s: damaged in the cache, made again", final)
            shutil.rmtree(final)
        if not final.is_dir():
            temporary = final.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed here
            try:
                temporary.mkdir()
                make(str(temporary))
                hashes = {p.name: _file_sha256(str(p), cache_dir) for p in temporary.iterdir()}
                Path(temporary, _HASHES).write_text(json.dumps(hashes, indent=1))
                temporary.rename(final)
            except Exception as err:
                shutil.rmtree(temporary, ignore_errors=True)  # on a disk that may be full
                cause = err.__cause__ if isinstance(err, CherryError) else err
                if isinstance(cause, Exception) and _is_of_disk(cause):
                    raise _unwritable(cause) from err
                raise
    return str(final)


def _intact(directory: Path, cache_dir: str) -> bool:
    record = directory / _HASHES
    if not record.is_file():
        return False
    try:
        hashes = dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        return False
    return all(
        (directory / name).is_file() and _file_sha256(str(directory / name), cache_dir) == digest
        for name, digest in hashes.items()
    )


def _is_of_disk(err: Exception) -> bool:
    """Whether an error is of the disk that is written to, and not of where it was read from."""
    if isinstance(err, SafetensorError):  # it is raised by what saves, and has no number
        return "os error" in str(err)
    return isinstance(err, OSError) and err.errno in _FULL


def _unwritable(err: Exception) -> ModelError:
    return ModelError(
        f"model.cache_dir: it cannot be written on node {platform.node()}: {err}. Make room there, "
        "or name another directory."
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")
    except OSError as err:
        raise _unwritable(err) from err
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released by the system if the process dies
        yield


def _convert_gguf(ref: ModelRef, into: str) -> None:
    """Dequantise to float32 safetensors: a GGUF takes half a minute to load, this 0.1 s."""
    _check_here(ref)
    if (digest := _file_sha256(ref.path, ref.cache_dir)) != _digest(ref):
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
