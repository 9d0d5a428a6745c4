"""What is there: objects and files listed through fsspec, each with a version of its content.

A version is an ETag where the store has one, else the time that the object was written. Whoever
reads rows of what was listed earlier asks `refuse_changed` after it: those of another version are
not the ones that were planned.
"""

import fnmatch
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from fsspec.utils import glob_translate

from pipeline.errors import ChangedError
from pipeline.storage import filesystem, is_local
from pipeline.storage_faults import reading

_MOMENTS = (
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modify", "modificationTime"),
    "created",
)
"""How file systems without ETags call the time that an object was written."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object."""

    url: str
    """With its protocol; a plain absolute path for local files."""
    size: int
    """Bytes."""
    version: str
    """ETag where the store has one, else modification time: changes when the content does."""
    modified: float = field(default=math.inf, compare=False)
    """Unix time, where it is known."""


def list_objects(url: str, *, globs: bool = True) -> list[ObjectInfo]:
    """All files under a directory, matched by a glob, or the one file named; sorted by URL.

    Directories that a glob matches are read as if they were named. Without `globs`, a path is what
    it says, whatever signs are in it, and so is a local one that is there.

    A missing directory lists as empty only where the store has no directories to miss; elsewhere
    it raises InputError, and so does a directory that cannot be listed.
    """
    fs, path = filesystem(url)
    local = is_local(url)
    below = _files_below if local else lambda fs, folder: fs.find(folder, detail=True)
    with reading(url, "listed"):
        fs.invalidate_cache()
        if globs and any(sign in path for sign in "*?[") and not (local and os.path.lexists(path)):
            found = dict(_matches(path) if local else fs.glob(path, detail=True))
            for name in [name for name, info in found.items() if info["type"] == "directory"]:
                found |= {} if "**" in path else below(fs, name)
        elif (info := fs.info(path))["type"] == "file":  # isfile would take an error for a no
            found = {path: info}
        else:
            found = dict(below(fs, path))
        for name, info in found.items():
            if info["type"] == "file" and (info.get("size") is None or not _version(info)):
                found[name] |= fs.info(name)  # listings over HTTP are names only
    return sorted(
        (
            ObjectInfo(
                name if local else fs.unstrip_protocol(name),
                size,
                _version(info),
                _modified(info),
            )
            for name, info in found.items()
            if info["type"] == "file" and (size := int(info["size"] or 0)) >= 0
        ),
        key=lambda entry: entry.url,
    )


def _matches(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What matches a local glob, also behind links; `**` follows none, or it might never end."""
    if "**" not in pattern:
        root, *parts = pattern.split("/")
        yield from ((name, _followed(name)) for name in _expanded(f"{root}/", parts))
        return
    root = re.split(r"[*?[]", pattern)[0].rpartition("/")[0] or "/"
    matches = re.compile(glob_translate(pattern)).match
    yield from ((name, _followed(name)) for name, _ in _walk(root) if matches(name))


def _expanded(folder: str, parts: list[str]) -> Iterator[str]:
    """Paths below a folder whose components match the parts of a glob."""
    if not parts:
        yield folder
        return
    part, *rest = parts
    names = [part] if not any(sign in part for sign in "*?[") else []
    if not names and os.path.isdir(folder):
        names = fnmatch.filter(sorted(os.listdir(folder)), part)
    for name in names:
        if os.path.lexists(path := os.path.join(folder, name)):
            yield from _expanded(path, rest)


def _files_below(_: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files at any depth, also in directories that are linked to, none of which is seen twice."""
    folders, known = [folder], set()
    for folder in folders:
        if (real := os.path.realpath(folder)) in known:
            continue  # or a link to what it lies in would be followed for ever
        known.add(real)
        for name, is_link in _walk(folder):
            if is_link and os.path.isdir(name):
                folders.append(name)
            elif not (is_link and _is_hidden(name) and not os.path.exists(name)):  # an editor's
                yield name, _followed(name)


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Files and links below a local folder, and which are links; none is left out for an error."""

    def fail(err: OSError) -> None:
        raise err

    for root, folders, names in os.walk(folder, onerror=fail):
        for name in sorted((*folders, *names)):
            path = os.path.join(root, name)
            if (is_link := os.path.islink(path)) or name in names:
                yield path, is_link


def _is_hidden(path: str) -> bool:
    return os.path.basename(path).startswith((".", "_"))


def _followed(name: str) -> dict[str, Any]:
    with reading(name, "followed"):
        return dict(filesystem(name)[0].info(name))


def list_names(url: str) -> dict[str, str]:
    """Names directly under a directory, with their versions; empty if it does not exist yet."""
    fs, path = filesystem(url)
    with reading(url, "listed"):
        fs.invalidate_cache()
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    return {
        PurePosixPath(entry["name"]).name: _version(entry)
        for entry in entries
        if entry["type"] == "file"
    }


def refuse_changed(listed: ObjectInfo) -> None:
    """See that an object is still the one that was listed, after it was read.

    Raises:
        ChangedError: It is another one.
        InputError: It is gone.
    """
    fs, path = filesystem(listed.url)
    with reading(listed.url):
        fs.invalidate_cache()
        info = fs.info(path)
    now = ObjectInfo(listed.url, int(info["size"] or 0), _version(info))
    if now != listed:
        raise ChangedError(
            f"{listed.url}: it was overwritten while it was in use: got {now.size:,} bytes of "
            f"version {now.version}, expected {listed.size:,} of {listed.version}. Put new data "
            "beside shards that are in use, not over them, and run again."
        )


def _version(info: dict[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("blob_id")
    if tag:
        return str(tag).strip('"')
    moment = next((info[key] for key in _MOMENTS if info.get(key)), "")
    return repr(moment) if isinstance(moment, float) else str(moment)


def _modified(info: dict[str, Any]) -> float:
    moment = next((info[key] for key in (*_MOMENTS, "updated") if info.get(key)), math.inf)
    if isinstance(moment, str):  # Google's, in RFC 3339
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:  # what others call a time
            return math.inf
    return moment.timestamp() if isinstance(moment, datetime) else float(moment)
