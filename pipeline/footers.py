"""Footers: what a Parquet shard's footer says, remembered so that it is read once.

``<output>/ingest/footers.parquet`` holds them by the source's URL, size and version (its ETag), so
that a rerun over shards that nobody has touched opens none of them. It is only a memory: any entry
whose version differs is read again, and without the file all are.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import listing, memories, storage
from pipeline.ingest import INGEST_VERSION
from pipeline.listing import ObjectInfo

_SCHEMA = pa.schema(
    [
        ("source_url", pa.string()),
        ("source_size", pa.int64()),
        ("source_version", pa.string()),
        ("url", pa.string()),
        ("read_url", pa.string()),
        ("schema", pa.binary()),  # Arrow IPC
        ("row_groups", pa.list_(pa.int64())),
        ("column_bytes", pa.map_(pa.string(), pa.int64())),
    ],
    {"cherry.ingest_version": str(INGEST_VERSION)},  # of another one, pieces are to be made anew
)


@dataclass(frozen=True)
class Footer:
    """Of one shard, whatever layout its columns are read as."""

    url: str
    """Identity: the input file, and for ingested JSON the number of its piece after a '#'."""
    read_url: str
    """Where the Parquet bytes are."""
    schema: pa.Schema
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    column_bytes: dict[str, int]
    """Uncompressed bytes of each top-level column."""


Known = dict[ObjectInfo, list[Footer]]
"""By source: one footer of a Parquet file, one for each piece of a JSON file."""


def read_footer(url: str, read_url: str) -> Footer:
    """Open a shard and read its footer."""
    with storage.open_parquet(read_url) as parquet:
        row_groups: list[int] = []
        column_bytes = dict.fromkeys(parquet.schema_arrow.names, 0)
        leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        owners = [_top_level(path, column_bytes) for path in leaves]
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            row_groups.append(group.num_rows)
            for number in range(group.num_columns):
                column_bytes[owners[number]] += group.column(number).total_uncompressed_size
        return Footer(url, read_url, parquet.schema_arrow, tuple(row_groups), column_bytes)


def _top_level(path: str, names: Container[str]) -> str:
    """The column of a path such as `messages.list.element.role`; its own name may have dots."""
    while path not in names and "." in path:
        path = path.rpartition(".")[0]
    return path


def load(output: str) -> Known:
    """What earlier runs have read; empty where there is nothing."""
    rows = memories.recall(_url(output), _SCHEMA)
    pieces = {row["read_url"] for row in rows if row["read_url"] != row["url"]}
    if pieces and not pieces <= _pieces_there(output):
        rows = [row for row in rows if row["read_url"] == row["url"]]  # somebody cleaned up
    schemas: dict[bytes, pa.Schema] = {}
    known: Known = {}
    for row in rows:
        source = ObjectInfo(row["source_url"], row["source_size"], row["source_version"])
        of_source = known.setdefault(source, [])
        if row["url"] is None:
            continue
        raw = row["schema"]
        schema = schemas.setdefault(raw, pa.ipc.read_schema(pa.py_buffer(raw)))
        footer = Footer(
            row["url"],
            row["read_url"],
            schema,
            tuple(row["row_groups"]),
            dict(row["column_bytes"]),
        )
        of_source.append(footer)
    return known


def save(output: str, known: Known) -> None:
    """Remember the footers of this input, in place of what was there."""
    rows = [
        row
        for source, footers in sorted(known.items(), key=lambda item: item[0].url)
        for row in _rows_of(source, footers)
    ]
    memories.remember(_url(output), rows, _SCHEMA)


def _rows_of(source: ObjectInfo, footers: list[Footer]) -> Iterator[dict[str, Any]]:
    named = {
        "source_url": source.url,
        "source_size": source.size,
        "source_version": source.version,
    }
    if not footers:  # a JSON file without a line, which is no news the next time
        yield named
    for footer in footers:
        yield {
            **named,
            "url": footer.url,
            "read_url": footer.read_url,
            "schema": footer.schema.serialize().to_pybytes(),
            "row_groups": footer.row_groups,
            "column_bytes": list(footer.column_bytes.items()),
        }


def _pieces_there(output: str) -> set[str]:
    folder = storage.join(storage.absolute(output), "ingest")
    return {entry.url for entry in listing.list_objects(folder, globs=False)}


def _url(output: str) -> str:
    return storage.join(storage.absolute(output), "ingest", "footers.parquet")
