"""Row reuse: a row that was scored before, though its shard was rewritten, is not paid for again.

Known rows are those of stale parts: parts under the same score fingerprint that the current input
does not name any more. Parts that it does name are left out on purpose: a run that was killed and
started again would find its own, take the scores of equal rows from them, and end with other last
bits than a run that nobody disturbed.

::

    scan     a task per group of stale parts: rows with status ok, in 16 buckets by sample_id
    merge    a task per bucket: sorted by sample_id, one copy of each
    find     in a worker: binary search, then the rows that were found

Buckets lie in the object store, one copy per node however many workers look things up, spilled to
disk where memory is short: 88 bytes for a known row of one turn. No process holds more than a
bucket while it is made.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import storage
from pipeline.cluster import TOKENISE_CPUS
from pipeline.errors import InputError
from pipeline.schemas import KNOWN, ids_of

log = logging.getLogger("cherry")

_NUM_BUCKETS = 16
_PARTS_PER_TASK = 64
_NO_ID = bytes(16)


@dataclass(frozen=True)
class KnownRows:
    """Scores by sample_id, in the object store."""

    buckets: tuple[Any, ...]
    """References to tables in the KNOWN schema, each sorted by sample_id; bucket i holds the ids
    that begin with the four bits i."""


def gather(part_urls: Sequence[str]) -> KnownRows:
    """Collect the scored rows of parts; where copies of a row differ, the first part's counts."""
    pieces: list[list[Any]] = [[] for _ in range(_NUM_BUCKETS)]
    for start in range(0, len(part_urls), _PARTS_PER_TASK):
        scan: Any = _scan.options(num_returns=_NUM_BUCKETS)
        tables = scan.remote(part_urls[start : start + _PARTS_PER_TASK])
        for bucket, table in zip(pieces, tables, strict=True):
            bucket.append(table)
    return KnownRows(tuple(_merge.remote(*bucket) for bucket in pieces))


def find(known: KnownRows, ids: Sequence[bytes | None]) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Look rows up.

    Args:
        known: From `gather`.
        ids: The sample_id of each row; None is never found.

    Returns:
        Positions in `ids` that are known, and their rows in the KNOWN schema, in the same order.
    """
    wanted = np.frombuffer(b"".join(i or _NO_ID for i in ids), "S16")
    bucket_of = _bucket_of(wanted)
    positions: list[npt.NDArray[np.int64]] = []
    rows: list[pa.Table] = []
    for number, bucket in enumerate(known.buckets):  # one at a time is held here
        asked = np.flatnonzero(bucket_of == number)
        table = ray.get(bucket) if len(asked) else KNOWN.empty_table()
        if len(table):
            have = ids_of(table["sample_id"])
            at = np.minimum(np.searchsorted(have, wanted[asked]), len(have) - 1)
            found = (have[at] == wanted[asked]) & (wanted[asked] != _NO_ID)
            positions.append(asked[found])
            rows.append(table.take(pa.array(at[found])))
    if not rows:
        return np.empty(0, np.int64), KNOWN.empty_table()
    return np.concatenate(positions), pa.concat_tables(rows)


def _bucket_of(ids: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint8]:
    first_byte = ids.view(np.uint8).reshape(-1, 16)[:, 0]
    return (first_byte >> 4).astype(np.uint8)


# Not a whole core: rows that were lost with a node are made again while actors hold all but one.
@ray.remote(num_cpus=TOKENISE_CPUS)
def _scan(urls: list[str]) -> Any:
    tables = [KNOWN.empty_table()]
    for url in urls:
        try:
            with storage.open_parquet(url) as parquet:
                part = parquet.read(columns=[*KNOWN.names, "status"])
        except InputError as err:
            log.warning("no scores are reused from it: %s", err)  # its rows are scored again
            continue
        part = part.filter(pc.equal(part["status"], "ok")).select(KNOWN.names)
        tables.append(part.cast(KNOWN))
    rows = pa.concat_tables(tables).combine_chunks()
    bucket_of = _bucket_of(ids_of(rows["sample_id"]))
    return tuple(rows.filter(pa.array(bucket_of == number)) for number in range(_NUM_BUCKETS))


@ray.remote(num_cpus=TOKENISE_CPUS)
def _merge(*tables: pa.Table) -> pa.Table:
    rows = pa.concat_tables(tables)
    _, first = np.unique(ids_of(rows["sample_id"]), return_index=True)
    return rows.take(pa.array(first)).combine_chunks()
