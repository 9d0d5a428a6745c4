"""Ingest: JSON and JSONL files become Parquet pieces, once.

Pieces lie under ``<output>/ingest/<key>/``, keyed by the source's URL, size, ETag and the ingest
version; `_DONE.json`, written last, names them. A bad line becomes a malformed row that names its
line, so that no row of the source is lost.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import listing, storage
from pipeline.errors import InputError
from pipeline.listing import ObjectInfo
from pipeline.schemas import BAD_LINE
from pipeline.storage_faults import reading, using_output

INGEST_VERSION = 2

SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_INGEST_ROWS = 50_000
"""Rows of a piece: bounds memory, and lets units of one file run in parallel."""


def ingest(entry: ObjectInfo, output: str) -> list[str]:
    """Turn one JSON file into Parquet pieces, unless that was done before; returns their URLs."""
    identity = f"{INGEST_VERSION}\n{entry.url}\n{entry.size}\n{entry.version}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = storage.join(storage.absolute(output), "ingest", key)
    done = storage.join(folder, "_DONE.json")
    with using_output():
        there = listing.list_names(folder)
        names = _pieces_of(done) if "_DONE.json" in there else []
    if names and set(names) <= there.keys():  # else somebody cleaned up
        return [storage.join(folder, name) for name in names]
    names = []
    texts: dict[str, bool] = {}
    num_good = num_bad = 0
    for number, rows in enumerate(_pieces(_read_rows(entry.url))):
        num_good += sum(row is not None for row, _, _ in rows)
        num_bad += sum(row is None for row, _, _ in rows)
        piece = _to_parquet(rows, texts)
        # Named by content: what a run that is refused below has left there is no other's piece.
        name = f"piece-{number:05d}-{hashlib.sha256(piece).hexdigest()[:16]}.parquet"
        # Where the first could be written, it is no matter of the config if a later one cannot.
        with using_output() if number == 0 else nullcontext():
            storage.publish(storage.join(folder, name), piece)
        names.append(name)
    if not names and not entry.size and entry.url.lower().endswith(tuple(COMPRESSIONS)):
        raise InputError(
            f"input {entry.url}: it has 0 bytes, which no compressed file has. Upload it again, or "
            "set input.on_bad_shard: skip."
        )
    listing.refuse_changed(entry)
    if num_bad and not num_good:
        raise InputError(
            f"input {entry.url}: none of its {num_bad:,} lines is a JSON object. Expected one "
            "object per line, or one array of objects."
        )
    record = {"source": entry.url, "version": entry.version, "pieces": names}
    storage.publish(done, json.dumps(record, indent=1).encode())
    return [storage.join(folder, name) for name in names]


def _pieces_of(done: str) -> list[str]:
    """Names of the pieces; none where the record is damaged."""
    try:
        return list(json.loads(storage.read_bytes(done))["pieces"])
    except (ValueError, TypeError, KeyError):
        return []


_Row = tuple[dict[str, Any] | None, str | None, str]
"""An object, or why there is none; and where it was: `line 7`."""

_MAX_DEPTH = 32
"""Levels of lists and objects in a row. Parquet readers stop at 100 levels of their own, of which
a list takes two: one deep row would make its whole shard unreadable."""

_UTF8_BOM = b"\xef\xbb\xbf"


def _pieces(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    piece: list[_Row] = []
    for row in rows:
        piece.append(row)
        if len(piece) == _INGEST_ROWS:
            yield piece
            piece = []
    if piece:
        yield piece


def _read_rows(url: str) -> Iterator[_Row]:
    """Rows of a JSONL file line by line, or of a .json file that holds one array."""
    fs, path = storage.filesystem(url)
    compression = next((c for s, c in COMPRESSIONS.items() if url.lower().endswith(s)), None)
    with reading(url), fs.open(path, "rb") as raw:
        stream = pa.CompressedInputStream(raw, compression) if compression else raw
        lines = io.BufferedReader(stream, 1 << 20) if compression else stream
        is_array = seen = False
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
            if not line.strip():
                continue
            if not seen and line.lstrip()[:1] == b"[":
                is_array = True
                rest = lines.read()
                break
            seen = True
            yield _parse_line(line, f"line {number}")
        if not is_array:
            return
    try:
        elements = json.loads(line + rest)
    except (ValueError, RecursionError) as err:
        raise InputError(
            f"input {url}: begins with '[' and is no valid JSON array: {err}. Repair it, or set "
            "input.on_bad_shard: skip."
        ) from None
    for number, element in enumerate(elements, start=1):
        yield _as_row(element, f"element {number}")


def _parse_line(line: bytes, where: str) -> _Row:
    try:
        return _as_row(json.loads(line), where)
    except json.JSONDecodeError as err:  # its own message counts lines within this one
        return None, f"{where}: {err.msg}: character {err.pos + 1}", where
    except (ValueError, RecursionError) as err:  # bad UTF-8
        return None, f"{where}: {err}", where


def _as_row(value: Any, where: str) -> _Row:
    if not isinstance(value, dict):
        return None, f"{where}: got {type(value).__name__}, expected an object", where
    try:
        return {_storable(k): _storable(v) for k, v in value.items()}, None, where
    except _TooDeep:
        return None, f"{where}: nested deeper than {_MAX_DEPTH} levels", where


def _to_parquet(rows: list[_Row], texts: dict[str, bool]) -> bytes:
    """A piece of a file.

    `texts` has the columns of the pieces before it, in order of appearance, and whether they are
    text: a piece in which one does not occur, or has numbers only, is read as they are.
    """
    for row, _, _ in rows:
        for name in row or ():
            texts.setdefault(name, False)
    reasons = [reason for _, reason, _ in rows]
    columns = {}
    for name, text in texts.items():
        values = [None if row is None else row.get(name) for row, _, _ in rows]
        columns[name], faults = _column(values, text)
        texts[name] = text or pa.types.is_string(columns[name].type)
        for index, fault in faults.items():
            reasons[index] = reasons[index] or f"{rows[index][2]}: column '{name}': {fault}"
    columns[BAD_LINE] = pa.array(reasons, pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def _column(values: list[Any], text: bool) -> tuple[pa.Array, dict[int, str]]:
    """An Arrow column of JSON values of whatever types.

    Scalars of mixed types become text, each in its JSON spelling; so do all scalars where `text`
    says so. Of lists and objects, the rows that do not fit the type of the rows before them become
    null, and are named.
    """
    nested = any(isinstance(v, (list, dict)) for v in values)
    try:
        column = pa.array(values)
        if nested or not text or pa.types.is_null(column.type):
            return column, {}
    except (pa.ArrowException, OverflowError):
        pass
    if not nested:
        texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        return pa.array(texts, pa.string()), {}
    kind: pa.DataType = pa.null()
    faults: dict[int, str] = {}
    for index, value in enumerate(values):
        try:
            seen = pa.schema([("v", pa.array([value]).type)])
            both = [pa.schema([("v", kind)]), seen]
            kind = pa.unify_schemas(both, promote_options="permissive").field("v").type
        except (pa.ArrowException, OverflowError) as err:
            faults[index] = str(err).splitlines()[0]
    for index, value in enumerate(values):
        try:  # an integer that no double holds, beside doubles
            pa.array([None if index in faults else value], kind)
        except (pa.ArrowException, OverflowError) as err:
            faults[index] = str(err).splitlines()[0]
    kept = [None if index in faults else value for index, value in enumerate(values)]
    return pa.array(kept, kind), faults


class _TooDeep(ValueError):
    """A value that Parquet could hold but not give back."""


def _storable(value: Any, depth: int = 1) -> Any:
    """A JSON value as Parquet can hold it.

    JSON can spell lone surrogates, UTF-8 cannot: they become U+FFFD, as other readers do. An
    object without keys becomes null: Parquet has no struct without fields. So does NaN, which is
    no JSON and by which Python writes what pandas has no value for: among texts it would be one.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, (list, dict)) and depth == _MAX_DEPTH:
        raise _TooDeep
    if isinstance(value, list):
        return [_storable(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {_storable(k): _storable(v, depth + 1) for k, v in value.items()} or None
    return value
