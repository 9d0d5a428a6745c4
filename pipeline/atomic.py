"""Files of this machine that appear whole or not at all.

A temporary file beside the target, fsync, and a hard link, which does not replace, or a rename,
which does.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Write = Callable[[str], object]
"""Makes a file at a path."""


def link_file(path: str, write: Write) -> bool:
    """Make a file appear at `path`, whole, and only if nothing is there; whether it did."""
    with _temporary(path, write) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    _sync_directory(path)
    return True


def replace_file(path: str, write: Write) -> None:
    """Make a file appear at `path`, whole, over whatever is there."""
    with _temporary(path, write) as temporary:
        os.replace(temporary, path)
    _sync_directory(path)


@contextmanager
def _temporary(path: str, write: Write) -> Iterator[str]:
    """A synced file beside `path`, gone in the end whatever happens."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    # A leading dot and no .parquet ending: no listing takes it for a part.
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):  # os.replace took it
            os.unlink(temporary)


def _sync_directory(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
