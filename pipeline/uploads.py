"""Unfinished writes: multipart uploads and temporary files whose writer was killed.

What they hold is paid for and serves nobody; `cherry gc` finds them.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.s3 import WholeS3FileSystem
from pipeline.storage import filesystem, is_local, remove
from pipeline.storage_faults import changing, reading

_OWN_FOLDERS = {
    "scores", "cherry", "embeddings", "experience", "models", "comparison", "training", "configs",
    "ingest", "ledger",
}  # fmt: skip
"""Of an output."""


@dataclass(frozen=True)
class Upload:
    """A write that was begun and not finished: what it holds is paid for and serves nobody."""

    url: str
    """Of the object to be, or of the temporary file of a local one."""
    upload_id: str
    """S3's name for it; empty for a temporary file."""
    started: float
    """Unix time."""


def dangling_uploads(url: str, older_than_s: float) -> list[Upload]:
    """Writes under a directory that were begun so long ago that nobody will finish them.

    On S3 multipart uploads, locally the temporary files of a ``publish`` that was killed. Other
    stores drop theirs by themselves.
    """
    fs, path = filesystem(url)
    with reading(url, "listed"):
        found = list(_temporary_files(path) if is_local(url) else _uploads_under(fs, path))
    before = time.time() - older_than_s
    return sorted((u for u in found if u.started <= before), key=lambda u: (u.url, u.upload_id))


def abort_upload(upload: Upload) -> None:
    """Give up an unfinished write and free what it holds; one that is gone is fine."""
    if not upload.upload_id:
        return remove(upload.url)
    fs, path = filesystem(upload.url)
    bucket, key, _ = fs.split_path(path)
    with changing(upload.url, "its upload cannot be aborted"), suppress(FileNotFoundError):
        fs.abort_mpu(bucket, key, upload.upload_id)


def _temporary_files(path: str) -> Iterator[Upload]:
    for file in Path(path).rglob(f".{'[0-9a-f]' * 32}.tmp"):
        with suppress(FileNotFoundError):  # its writer has finished
            yield Upload(str(file), "", file.stat().st_mtime)


def _uploads_under(fs: Any, path: str) -> Iterator[Upload]:
    """The unfinished multipart uploads to keys under a directory; none in other stores."""
    if not isinstance(fs, WholeS3FileSystem):
        return
    bucket, key, _ = fs.split_path(path)
    asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    while True:
        page = fs.call_s3("list_multipart_uploads", **asked)
        for upload in page.get("Uploads", []):
            if not key and upload["Key"].partition("/")[0] not in _OWN_FOLDERS:
                continue  # the output is a whole bucket, which others may write to
            url = f"s3://{bucket}/{upload['Key']}"
            yield Upload(url, upload["UploadId"], upload["Initiated"].timestamp())
        if not page.get("IsTruncated"):
            return
        asked["KeyMarker"] = page.get("NextKeyMarker", "")
        asked["UploadIdMarker"] = page.get("NextUploadIdMarker", "")
