"""What is there: objects and files listed through fsspec, each with a version of its content.

A version is an ETag where the store has one, else the time that the object was written. Whoever
reads rows of what was listed earlier asks `refuse_changed` after it: those of another version are
not the ones that were planned.
"""

import fnmatch
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from fsspec.utils import glob_translate

from pipeline.errors import ChangedError, InputError
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

    Directories that a glob matches are read as if they were named, but a last `*` is files only.
    Without `globs`, a path is what it says, whatever signs are in it, and so is a local one that is
    there.

    A missing directory lists as empty only where the store has no directories to miss; elsewhere
    it raises InputError, and so does a directory that cannot be listed.
    """
    fs, path = filesystem(url)
    local = is_local(url)
    below = _files_below if local else partial(fs.find, detail=True)
    with reading(url, "listed"):
        fs.invalidate_cache()
        if globs and is_glob(url):
            found = dict(_infos(_matches(path)) if local else fs.glob(path, detail=True))
            if path.rpartition("/")[2] != "*" and "**" not in path:
                for name in [n for n, info in found.items() if info["type"] == "directory"]:
                    found |= below(name)
        elif (info := fs.info(path))["type"] == "file":  # isfile would take an error for a no
            found = {path: info}
        else:
            found = dict(below(path))
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


def is_hidden(name: str) -> bool:
    """Whether other tools call their markers and unfinished files so."""
    return name.startswith((".", "_"))


def is_glob(url: str) -> bool:
    """Whether a path has signs of a pattern, and is not simply there under this name."""
    signs = any(sign in url for sign in "*?[")
    return signs and not (is_local(url) and os.path.lexists(filesystem(url)[1]))


def _matches(pattern: str) -> Iterator[str]:
    """What matches a local glob, also behind links; `**` follows none, or it might never end."""
    root, *parts = pattern.split("/")
    if "**" not in pattern:
        yield from _expanded(f"{root}/", parts)
        return
    before = list(itertools.takewhile(lambda part: "**" not in part, parts))
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as err:  # `a**b`
        raise InputError(f"{pattern}: {err}") from None
    for folder in _expanded(f"{root}/", before):
        for name, _ in _walk(folder):
            if any(matches(str(path)) for path in (name, *PurePosixPath(name).parents)):
                yield name


def _expanded(folder: str, parts: list[str], *, named: bool = True) -> Iterator[str]:
    """Paths below a folder, which is named or was matched, that match the parts of a glob."""
    if not parts:
        yield folder
        return
    part, *rest = parts
    names = [part]
    is_wild = any(sign in part for sign in "*?[")
    try:
        if is_wild:
            names = fnmatch.filter(sorted(os.listdir(folder)), part)
        else:
            os.lstat(os.path.join(folder, part))
    except (NotADirectoryError, FileNotFoundError):
        return
    except OSError:
        if named or not _is_overlooked(folder):
            raise
        return
    for name in names:
        yield from _expanded(os.path.join(folder, name), rest, named=not is_wild)


def _files_below(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files at any depth, also in directories that are linked to, none of which is seen twice."""
    folders, known = [folder], set()
    for folder in folders:
        if (real := os.path.realpath(folder)) in known:
            continue  # or a link to what it lies in would be followed for ever
        known.add(real)
        for name, is_link in _walk(folder):
            if is_link and os.path.isdir(name):
                folders.append(name)
            else:
                yield from _infos([name])


def _walk(top: str) -> Iterator[tuple[str, bool]]:
    """Files and links below a local folder, in order, and which are links.

    Nothing that would be read is left out for an error.
    """

    def fail(err: OSError) -> None:
        if err.filename == top or not _is_overlooked(str(err.filename)):
            raise err

    for root, folders, names in os.walk(top, onerror=fail):
        files = set(names)
        entries = sorted((*folders, *names))
        folders.sort()
        for name in entries:
            path = os.path.join(root, name)
            if (is_link := os.path.islink(path)) or name in files:
                yield path, is_link


def _is_overlooked(path: str) -> bool:
    """Whether nothing in it is read unless it is named, or it is what every ext4 disk has."""
    name = os.path.basename(path.rstrip("/"))
    return is_hidden(name) or name == "lost+found"


def _infos(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is known of local paths, or of what they are links to."""
    for name in names:
        if _is_overlooked(name) and not os.path.exists(name):
            continue  # an editor's lock is a link that leads nowhere
        with reading(name, "followed"):
            yield name, dict(filesystem(name)[0].info(name))


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
