"""What is there: objects and files listed through fsspec, each with a version of its content.

A version is an ETag where the store has one, else the time that the object was written. Whoever
reads rows of what was listed earlier asks `refuse_changed` after it: those of another version are
not the ones that were planned.
"""

import glob
import math
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

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

    Without `globs`, a path is what it says, whatever signs are in it.

    A missing directory lists as empty only where the store has no directories to miss; elsewhere
    it raises InputError.
    """
    fs, path = filesystem(url)
    local = is_local(url)
    with reading(url, "listed"):
        fs.invalidate_cache()
        if globs and any(sign in path for sign in "*?["):
            found = _matches(fs, path) if local else fs.glob(path, detail=True)
        elif (info := fs.info(path))["type"] == "file":  # isfile would take an error for a no
            found = {path: info}
        else:
            found = _files_below(fs, path) if local else fs.find(path, detail=True)
        for name, info in found.items():
            if info.get("islink"):  # as `**` lists it
                found[name] = info = _followed(fs, name)
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


def _matches(fs: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """What matches a glob, also behind links; `**` follows none, or it might never end."""
    if "**" in pattern:
        return dict(fs.glob(pattern, detail=True))
    return {name: _followed(fs, name) for name in glob.glob(pattern, include_hidden=True)}


def _files_below(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Files at any depth, also in directories that are linked to, none of which is seen twice."""
    found: dict[str, dict[str, Any]] = {}
    folders, known = [folder], set()
    for folder in folders:
        if (real := os.path.realpath(folder)) in known:
            continue  # or a link to what it lies in would be followed for ever
        known.add(real)
        for name, info in fs.find(folder, detail=True).items():
            if info["islink"]:  # listed as neither file nor directory
                info = _followed(fs, name)
            if info["type"] == "directory":
                folders.append(name)
            found[name] = info
    return found


def _followed(fs: Any, name: str) -> dict[str, Any]:
    with reading(name, "followed"):
        return dict(fs.info(name))


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
