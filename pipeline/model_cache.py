"""The cache of a node: directories that are made once, whole, and known by their contents.

::

    <cache_dir>/models/<name>/       a model that was fetched or converted, and cherry_hashes.json
                       <name>.lock   held by the process that makes it
    <cache_dir>/hashes/<key>         the content hash of a file that has not changed since
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pipeline.errors import CherryError, ModelError

log = logging.getLogger("cherry")

HASHES = "cherry_hashes.json"
"""Name of the record that a directory has of its files."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def file_sha256(path: str, cache_dir: str) -> str:
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


def make_once(cache_dir: str, name: str, make: Callable[[str], None]) -> str:
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
                hashes = {p.name: file_sha256(str(p), cache_dir) for p in temporary.iterdir()}
                Path(temporary, HASHES).write_text(json.dumps(hashes, indent=1))
                temporary.rename(final)
            except Exception as err:
                shutil.rmtree(temporary, ignore_errors=True)  # on a disk that may be full
                cause = err.__cause__ if isinstance(err, CherryError) else err
                if isinstance(cause, Exception) and _is_of_disk(cause):
                    raise _unwritable(cause) from err
                raise
    return str(final)


def _intact(directory: Path, cache_dir: str) -> bool:
    record = directory / HASHES
    if not record.is_file():
        return False
    try:
        hashes = dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        return False
    return all(
        (directory / name).is_file() and file_sha256(str(directory / name), cache_dir) == digest
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
