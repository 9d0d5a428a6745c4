"""S3 through s3fs, with one bound on retries, and objects that arrive whole or not at all.

Three libraries on top of each other retry: aiohttp once, on a connection that had gone stale;
botocore; and s3fs in two nested loops, so that a store that refuses is asked 5 x 5 x 5 times for
a range. Here only botocore does, in its ``standard`` mode: exponential backoff with jitter, for
5xx, throttling and lost connections. What it cannot see is asked for again here, as often and
with the same pauses:

* a body that ends early: botocore hands bodies on before they have come;
* a body shorter than was asked for, under a length that matches: s3fs does not compare;
* a request that arrived damaged, which the store noticed by its checksum.

A store that stays silent costs at most 6 x 15 s of waiting and 31 s of pauses; one that answers
with errors, the pauses only: 16 s on average. AWS_MAX_ATTEMPTS and AWS_RETRY_MODE, or the same
settings of the profile, go before the defaults.
"""

import asyncio
import functools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import botocore.session
from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
from fsspec.asyn import sync, sync_wrapper
from s3fs.core import S3File, S3FileSystem
from s3fs.utils import FileExpired

ATTEMPTS = 6
"""The first included; botocore's own 3 give up after 3 s, too soon for a bucket that scales."""
_PRECONDITION = {"PreconditionFailed", "412"}
_DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
# 409: another conditional write of the key is in flight, and may yet fail. NoSuchUpload: the answer
# to the end of a multipart upload was lost; a second upload finds out whether the object is there.
_START_OVER = {"ConditionalRequestConflict", "OperationAborted", "409", "NoSuchUpload"}
_RANGE_BYTES = 16 << 20  # of a download; four ranges are under way at a time
_T = TypeVar("_T")


class BrokenError(OSError):
    """What came is not what the store holds; asking again may bring it."""

    attempts = 0
    """How many were made when it was given up; 0 while it is not."""


def pause_s(attempt: int) -> float:
    """Seconds after an attempt (from 1) that failed: botocore's own, up to 1, 2, 4, ... 20."""
    return random.random() * min(2.0 ** (attempt - 1), 20.0)


class WholeS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """An s3fs whose every read brings all bytes that were asked for, or raises OSError."""

    retries = 1  # of s3fs's loops, which is none
    connect_timeout = 5
    read_timeout = 15  # between two bytes, or from the last byte sent to the first one received

    @functools.cached_property
    def attempts(self) -> int:
        """Of one request, the first included."""
        return max(1, botocore.session.Session().get_config_variable("max_attempts") or ATTEMPTS)

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._prepare_config_kwargs()
        profile = botocore.session.Session().get_scoped_config()
        mode = os.environ.get("AWS_RETRY_MODE") or profile.get("retry_mode") or "standard"
        config.setdefault("retries", {"mode": mode, "total_max_attempts": self.attempts})
        return config

    async def set_session(self, refresh: bool = False, kwargs: Any = None) -> Any:
        """The client, which notes on an error how many attempts came before it."""
        client = await super().set_session(refresh)
        client.meta.events.register_first("needs-retry.s3", _note, unique_id="cherry-attempts")
        return client

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Make a call again while what it brings is broken."""
        attempt = 1
        while True:
            try:
                return await call()
            except BrokenError as err:
                if not err.attempts and attempt >= self.attempts:
                    err.attempts = attempt
                if err.attempts:  # given up here, or by a call within this one
                    raise
            await asyncio.sleep(pause_s(attempt))
            attempt += 1

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            try:
                return await super(WholeS3FileSystem, self)._call_s3(method, *akwarglist, **kwargs)
            except OSError as err:
                if code_of(err) in _DAMAGED:
                    raise BrokenError(f"{code_of(err)}: {err}") from err
                raise

        return await self._patiently(call)

    call_s3 = sync_wrapper(_call_s3)

    async def _read_range(
        self, path: str, start: int, stop: int, size: int, **options: Any
    ) -> bytes:
        """Bytes `start` to `stop` of an object of `size` bytes; FileExpired if it is another."""
        bucket, key, version = self.split_path(path)
        asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", **options}
        asked |= {"VersionId": version} if version else {}

        async def call() -> bytes:
            try:
                response = await self._call_s3("get_object", **asked)
            except OSError as err:
                if code_of(err) in _PRECONDITION:
                    raise FileExpired(path, options.get("IfMatch")) from None
                raise
            try:
                data: bytes = await response["Body"].read()
            except (aiohttp.ClientError, HTTPClientError, IncompleteReadError) as err:
                raise BrokenError(f"bytes {start:,} to {stop:,} broke off: {err}") from err
            finally:
                response["Body"].close()
            total = str(response.get("ContentRange")).rpartition("/")[2]
            if total.isdigit() and int(total) != size:
                raise FileExpired(path, options.get("IfMatch"))
            if len(data) != stop - start:
                raise BrokenError(f"got {len(data):,} bytes of {start:,} to {stop:,}")
            return data

        return await self._patiently(call) if start < stop else b""

    async def _cat_file(
        self, path: str, version_id: Any = None, start: Any = None, end: Any = None, **_o: Any
    ) -> bytes:
        left = self.attempts
        while True:
            info = await self._info(path, refresh=True)  # a cached size may be of an older object
            if info["type"] != "file":
                raise FileNotFoundError(path)
            first, last, _ = slice(start, end).indices(info["size"])
            left -= 1
            try:
                return await self._read_range(path, first, last, info["size"], **_only_if(info))
            except FileExpired:  # replaced in between: the new one has another size
                if not left:
                    raise

    async def _pipe_file(self, path: str, data: bytes, **options: Any) -> Any:
        async def call() -> Any:
            try:
                return await super(WholeS3FileSystem, self)._pipe_file(path, data, **options)
            except OSError as err:
                if code_of(err) in _START_OVER:
                    raise BrokenError(f"{code_of(err)}: {err}") from err
                raise

        return await self._patiently(call)

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        if os.path.isdir(lpath):  # as fsspec's recursive get has it
            return
        info = await self._info(rpath, refresh=True)
        size = info["size"]
        with open(lpath, "wb") as sink:
            for base in range(0, size, 4 * _RANGE_BYTES):
                stops = range(base, min(base + 4 * _RANGE_BYTES, size), _RANGE_BYTES)
                ranges = [(start, min(start + _RANGE_BYTES, size)) for start in stops]
                reads = [self._read_range(rpath, a, b, size, **_only_if(info)) for a, b in ranges]
                for data in await asyncio.gather(*reads):
                    sink.write(data)

    async def _walk(
        self, path: str, maxdepth: Any = None, topdown: bool = True, on_error: Any = None, **kw: Any
    ) -> AsyncIterator[Any]:
        # fsspec's default omits what it cannot list: under a 503 a glob would match nothing.
        raising = on_error or _raise_unless_missing
        async for found in super()._walk(path, maxdepth, topdown=topdown, on_error=raising, **kw):
            yield found

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **options)
        options = {name: value for name, value in options.items() if value is not None}
        options.setdefault("block_size", self.default_block_size)
        options.setdefault("cache_type", self.default_cache_type)
        return _WholeFile(self, path, mode, **options)


class _WholeFile(S3File):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        read, stop = self.fs._read_range, min(end, self.size)
        data: bytes = sync(self.fs.loop, read, self.path, start, stop, self.size, **self.read_kw)
        return data


def code_of(err: BaseException) -> str | None:
    """S3's code for an error, where S3 made it."""
    cause: BaseException | None = err
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__
    return None if cause is None else str(cause.response.get("Error", {}).get("Code"))


def says_exists(err: BaseException) -> bool:
    """Whether a conditional PUT failed because of its condition."""
    return isinstance(err, FileExistsError) or code_of(err) in _PRECONDITION


def _note(attempts: int, caught_exception: Any = None, **_: Any) -> None:
    if caught_exception is not None:
        caught_exception.attempts = attempts


def _only_if(info: dict[str, Any]) -> dict[str, Any]:
    return {"IfMatch": info["ETag"]} if info.get("ETag") else {}


def _raise_unless_missing(err: Exception) -> None:
    if not isinstance(err, FileNotFoundError):
        raise err
