"""Object storage through fsspec: read, and publish once.

Every object of a run is written whole and at most once. ``publish`` makes it appear atomically
and only if it is absent, so the first writer wins and an object that exists is work that is done:

* object stores: one conditional PUT (``If-None-Match: *``);
* file systems: a temporary file, fsync, and a hard link, which does not replace.

A store that fails is asked again, within bounds (for S3: ``pipeline.s3``). In the end there is the
whole object, or an error that names it.
"""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.atomic import Write, link_file, replace_file
from pipeline.errors import InputError
from pipeline.s3 import WholeS3FileSystem, says_exists
from pipeline.storage_faults import changing, no_parquet, reading

A = TypeVar("A")
B = TypeVar("B")

_LARGE_ROW_GROUP = 1 << 28
"""Bytes, uncompressed. A larger row group is not read at once: it would be in memory whole, once
for each task that reads."""

_READ_AHEAD = 1 << 23
"""Bytes that are read of each column of it at a time."""

_READERS = 8
"""Objects that are read at a time by one process."""


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    if url.startswith(("s3://", "s3a://")):
        options = WholeS3FileSystem._get_kwargs_from_urls(url)  # of `?versionId=...`
        return WholeS3FileSystem(**options), WholeS3FileSystem._strip_protocol(url)
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ValueError, ImportError) as err:
        raise InputError(f"{url}: no file system for this URL: {err}") from None


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def join(base: str, *names: str) -> str:
    """`a/b` + `c` -> `a/b/c`, on URLs and paths alike."""
    return "/".join([base.rstrip("/"), *names])


def absolute(url: str) -> str:
    """A local path made absolute, without `..`; other URLs in one spelling, less a last slash."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return os.path.normpath(path)
    if "::" in url or fs._get_kwargs_from_urls(url):  # the path alone does not say where it is
        return url.rstrip("/")
    return str(fs.unstrip_protocol(path)).rstrip("/")  # as listings have it: abfs:// for az://


def read_bytes(url: str) -> bytes:
    """The whole object."""
    fs, path = filesystem(url)
    with reading(url):
        return bytes(fs.cat_file(path))


def read_many(urls: Iterable[str]) -> Iterator[bytes]:
    """Whole objects, in order, several under way at a time."""
    return several(read_bytes, urls)


def several(read: Callable[[A], B], of: Iterable[A]) -> Iterator[B]:
    """What `read` gives of each, in order, several under way at a time: reads mostly wait.

    No more than these are held: a part of embeddings may have a gigabyte.
    """
    under_way: deque[Future[B]] = deque()
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for each in of:
            if len(under_way) == _READERS:
                yield under_way.popleft().result()
            under_way.append(pool.submit(read, each))
        while under_way:
            yield under_way.popleft().result()


def exists(url: str) -> bool:
    """Whether there is an object or a directory at the URL."""
    fs, path = filesystem(url)
    with reading(url):
        fs.invalidate_cache()
        return _info(fs, path) is not None


@contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet object; a bad one raises InputError that names it."""
    fs, path = filesystem(url)
    with reading(url):
        # pyarrow asks for exact ranges and coalesces them: a read-ahead cache would only add bytes.
        handle = pa.OSFile(path) if _local(fs) else fs.open(path, "rb", cache_type="none")
    with handle, reading(url):
        # Parts have checksums; where there are none, none are looked at.
        options: dict[str, Any] = {"page_checksum_verification": True}
        try:
            parquet = pq.ParquetFile(handle, pre_buffer=not _local(fs), **options)
            if _has_large_row_group(parquet.metadata):
                options |= {"metadata": parquet.metadata, "buffer_size": _READ_AHEAD}
                parquet = pq.ParquetFile(handle, pre_buffer=False, **options)
        except (ValueError, OSError) as err:
            if not no_parquet(err):
                raise
            raise InputError(
                f"{url}: not a readable Parquet file: {err}. Replace it, or set "
                "input.on_bad_shard: skip."
            ) from err
        with parquet:
            yield parquet


def _has_large_row_group(footer: pq.FileMetaData) -> bool:
    groups = (footer.row_group(number) for number in range(footer.num_row_groups))
    return any(group.total_byte_size > _LARGE_ROW_GROUP for group in groups)


def publish(url: str, data: bytes) -> bool:
    """Make `data` appear at `url`, whole, and only if nothing is there.

    Returns:
        True if this call wrote it, False if it was there already.

    Raises:
        StorageError: It could not be written.
    """

    def send(fs: Any, path: str) -> None:
        fs.pipe_file(path, data, mode="create")

    return _create(url, _writer(data), send, f"cannot write {len(data):,} bytes")


def publish_file(url: str, write: Write) -> bool:
    """Make the file that `write` makes at a path of this machine appear at `url`, as `publish`.

    Raises:
        StorageError: There is no room for it here, or it could not be written there.
    """

    def send(fs: Any, path: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "object")
            write(temporary)
            fs.put_file(temporary, path, mode="create")

    return _create(url, write, send, "cannot be written")


def _create(url: str, write: Write, send: Callable[[Any, str], None], what: str) -> bool:
    """Locally by `write`, elsewhere by `send`, which refuses what is there."""
    fs, path = filesystem(url)
    with changing(url, what):
        if _local(fs):
            return link_file(path, write)
        try:
            send(fs, path)
        except OSError as err:
            if says_exists(err):
                return False
            raise
        return True


def _writer(data: bytes) -> Write:
    return lambda path: Path(path).write_bytes(data)


def replace(url: str, data: bytes) -> None:
    """Write an object atomically, over whatever is there.

    Raises:
        StorageError: It could not be written.
    """
    fs, path = filesystem(url)
    with changing(url, f"cannot write {len(data):,} bytes"):
        if _local(fs):
            replace_file(path, _writer(data))
        else:
            fs.pipe_file(path, data)


def replace_if_unchanged(url: str, data: bytes) -> None:
    """Point a small object at new content, unless another writer moved it meanwhile.

    The one object that moves is LATEST.json; losing the race to another run is a success, since
    that run's result is as new as this one's. Only S3 tells of one: elsewhere the last writer wins.
    """
    fs, path = filesystem(url)
    with changing(url, f"cannot write {len(data):,} bytes"):
        if _local(fs):
            replace_file(path, _writer(data))
            return
        fs.invalidate_cache()
        info = _info(fs, path)
        if info is None:
            publish(url, data)
            return
        if "ETag" not in info:
            fs.pipe_file(path, data)
            return
        try:
            fs.pipe_file(path, data, IfMatch=info["ETag"])
        except OSError as err:
            if not says_exists(err):
                raise


def remove(url: str) -> None:
    """Remove one object or file; one that is not there is removed already."""
    fs, path = filesystem(url)
    with changing(url, "cannot be removed"), suppress(FileNotFoundError):
        fs.rm_file(path)


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    """None if there is nothing; any other answer than yes or no is an error."""
    try:
        return dict(fs.info(path))
    except FileNotFoundError:
        return None


def _local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)
