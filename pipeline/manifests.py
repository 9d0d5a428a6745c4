"""Results that are done when their manifest is there: subsets and models.

What a result consists of is published first, its manifest last, and once: of two drivers that make
the same one, the first to write it wins, and both go on with what it says.
"""

import json
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import StorageError


@dataclass(frozen=True)
class Finished:
    """A finished result."""

    url: str
    """Its directory."""
    manifest: dict[str, Any]
    """Settings, counts and parts, as stored."""

    @property
    def manifest_url(self) -> str:
        """The object that says it is done."""
        return _manifest_url(self.url)


def find(url: str) -> Finished | None:
    """The result in a directory, if it is done."""
    if not storage.exists(_manifest_url(url)):
        return None
    return _finished(url, storage.read_bytes(_manifest_url(url)))


def finish(url: str, manifest: dict[str, Any]) -> Finished:
    """Say that a result is done; another driver may have said so first."""
    data = json.dumps(manifest, indent=1).encode()
    if not storage.publish(_manifest_url(url), data):
        data = storage.read_bytes(_manifest_url(url))
    return _finished(url, data)


def _finished(url: str, data: bytes) -> Finished:
    try:
        manifest = json.loads(data)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise StorageError(
            f"{_manifest_url(url)}: it is damaged: got {len(data):,} bytes, expected one JSON "
            "object. Delete it and run again."
        )
    return Finished(url, manifest)


def _manifest_url(url: str) -> str:
    return storage.join(url, "_MANIFEST.json")
