"""Paths of an input: what they name, and that the output is no part of it."""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence

from fsspec.utils import glob_translate

from pipeline import listing, storage
from pipeline.errors import InputError


def reach_of(paths: Sequence[str]) -> Callable[[str], bool]:
    """Which shards paths name, as a test of their URLs: those too that are not there any more."""
    tests = [_reach_of(path) for path in paths]
    return lambda url: any(test(re.sub(r"#\d+$", "", url)) for test in tests)  # less JSON's piece


def _reach_of(path: str) -> Callable[[str], bool]:
    fs, inside = storage.filesystem(path)
    path = storage.absolute(path) if storage.is_local(path) else fs.unstrip_protocol(inside)
    path = path.rstrip("/")
    matches = _glob_test(path) if listing.is_glob(path) else None

    def reaches(url: str) -> bool:
        if url == path:
            return True
        found = matches(url) if matches else url.startswith(f"{path}/")
        return found and not hidden(path, url)

    return reaches


def _glob_test(pattern: str) -> Callable[[str], bool]:
    """Whether a glob matches a file, or a directory that it lies in and that is read for it."""
    parts = pattern.split("/")
    if "**" in pattern:
        match = re.compile(glob_translate(pattern)).match
        if not storage.is_local(pattern):  # a store gives what matches, and nothing below it
            return lambda url: bool(match(url))
        return lambda url: any(map(match, (url, *_folders_of(url))))
    if parts[-1] == "*":  # files only
        return lambda url: url.count("/") == pattern.count("/") and _fits(url, parts)
    return lambda url: url.count("/") >= pattern.count("/") and _fits(url, parts)


def _fits(url: str, parts: list[str]) -> bool:
    return all(map(fnmatch.fnmatchcase, url.split("/"), parts))


def _folders_of(url: str) -> Iterator[str]:
    while "/" in url:
        url = url.rpartition("/")[0]
        yield url


def hidden(base: str, url: str) -> bool:
    """Markers and temporary files of other tools: names that begin with '_' or '.'.

    Directories below `base` count too: `_temporary/0/part-0.parquet` is an unfinished job's.
    """
    root = base
    if listing.is_glob(base):
        root = re.split(r"[*?[]", base)[0].rpartition("/")[0]
    return any(map(listing.is_hidden, url.removeprefix(root).strip("/").split("/")))


def refuse_overlap(path: str, output: str) -> None:
    """See that no run will take its own results, or another's under the output, for input.

    Raises:
        InputError: The output lies where the path reads.
    """
    if not listing.is_glob(path):
        if output == path or output.startswith(f"{path}/"):
            raise overlap(path, output)
        return
    before, any_depth, _ = path.partition("**")
    parts = f"{before}{any_depth[:1]}".split("/")
    above = output.count("/") < re.split(r"[*?[]", path)[0].count("/") - 1
    # The output, or what comes to lie in it or around it, would match.
    if not above and _fits(output, parts):
        raise overlap(path, output)


def overlap(path: str, output: str) -> InputError:
    """What to say of an output that lies where a path reads."""
    return InputError(
        f"output {output}: it lies inside the input {path}, so that the next run would take "
        "its own results for input. Choose an output beside the input."
    )


def behind_links(url: str, output: str) -> str:
    """Where a local file really is; other URLs as they are."""
    if not storage.is_local(url):
        return url
    real = os.path.realpath(url)
    inside = f"{os.path.realpath(output)}/"
    if real.startswith(inside) and not url.startswith(f"{output}/"):
        raise InputError(
            f"input {url}: it is, by a link, part of the output {output}, so that a run would take "
            "its own results for input. Take out the link, or choose another output."
        )
    return real
