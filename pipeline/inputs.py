"""The front door: whatever the corpus is stored as, behind it there are only Parquet shards.

Parquet is listed as it is. JSON and JSONL (also .gz, .zst) are turned into Parquet once, under
``<output>/ingest/``, keyed by the source's URL, size, ETag and the ingest version. A bad line
becomes a malformed row that names its line.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import InputConfig
from pipeline.errors import InputError
from pipeline.samples import Columns, find_columns
from pipeline.schemas import BAD_LINE
from pipeline.storage import ObjectInfo

INGEST_VERSION = 1
_INGEST_ROWS = 50_000
"""Rows of an ingested Parquet shard: bounds memory, and lets units of one file run in parallel."""

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Shard:
    """One Parquet file to score, and what its footer says."""

    url: str
    """Identity: the input file, and for ingested JSON the number of its piece after a '#'."""
    read_url: str
    """Where the Parquet bytes are."""
    size: int
    version: str
    columns: Columns
    schema: pa.Schema
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    text_bytes: int
    """Uncompressed bytes of the layout's columns."""

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Corpus:
    """All shards, sorted by URL, and those that could not be read."""

    shards: tuple[Shard, ...]
    skipped: tuple[str, ...] = ()
    """Why each bad shard was left out, under `on_bad_shard: skip`."""


def open_corpus(config: InputConfig, output: str) -> Corpus:
    """List the input, ingest what is JSON, and read every footer.

    Raises:
        InputError: A path is missing, empty, forbidden, holds no known format, overlaps the
            output, or a shard is unreadable and `on_bad_shard` is `fail`.
    """
    found: dict[str, ObjectInfo] = {}
    for path in config.paths:
        path = storage.absolute(path)
        _refuse_overlap(path, storage.absolute(output))
        for entry in _list_path(path):
            found[entry.url] = entry
    sources = [found[url] for url in sorted(found)]
    with ThreadPoolExecutor(max_workers=16) as pool:  # footers are small reads, mostly waiting
        opened = list(pool.map(lambda entry: _open_source(entry, config, output), sources))
    shards: list[Shard] = []
    skipped: list[str] = []
    for result in opened:
        if isinstance(result, InputError):
            if config.on_bad_shard == "fail":
                raise result
            skipped.append(str(result))
        else:
            shards.extend(result)
    if not any(shard.num_rows for shard in shards):
        raise InputError(
            f"input {', '.join(config.paths)}: no rows in {len(sources)} files."
            + "".join(f"\n{reason}" for reason in skipped)
        )
    return Corpus(tuple(shards), tuple(skipped))


def _list_path(path: str) -> list[ObjectInfo]:
    entries = storage.list_objects(path)
    named = len(entries) == 1 and entries[0].url == path
    fitting = [e for e in entries if _format(e.url) and (named or not _hidden(path, e.url))]
    if fitting:
        return fitting
    if not entries:
        raise InputError(f"input {path}: nothing is there: an empty directory, or no match.")
    names = ", ".join(entry.url.rpartition("/")[2] for entry in entries[:3])
    raise InputError(
        f"input {path}: no Parquet inside, and no JSON: has {len(entries)} other files ({names}). "
        "Expected .parquet, .json or .jsonl (also .gz, .zst)."
    )


def _hidden(base: str, url: str) -> bool:
    """Markers and temporary files of other tools: names that begin with '_' or '.'.

    Directories below `base` count too: `_temporary/0/part-0.parquet` is an unfinished job's.
    """
    fixed, *wild = re.split(r"[*?[]", base)
    root = fixed.rpartition("/")[0] if wild else base
    return any(n.startswith(("_", ".")) for n in url.removeprefix(root).strip("/").split("/"))


def _format(url: str) -> str | None:
    name = url.lower()
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    for suffix in _COMPRESSIONS:
        name = name.removesuffix(suffix)
    return "json" if name.endswith(_JSON_SUFFIXES) else None


def _refuse_overlap(path: str, output: str) -> None:
    base = path.split("*")[0].rstrip("/") if "*" in path else path
    if output == base or output.startswith(base + "/"):
        raise InputError(
            f"output {output}: it lies inside the input {path}, so that the next run would take "
            "its own results for input. Choose an output beside the input."
        )


def _open_source(entry: ObjectInfo, config: InputConfig, output: str) -> list[Shard] | InputError:
    try:
        if _format(entry.url) == "parquet":
            return [_open_shard(entry, entry.url, entry.url, config)]
        pieces = _ingest(entry, output)
        return [
            _open_shard(entry, f"{entry.url}#{number}", piece, config)
            for number, piece in enumerate(pieces)
        ]
    except InputError as err:
        return err


def _open_shard(entry: ObjectInfo, url: str, read_url: str, config: InputConfig) -> Shard:
    with storage.open_parquet(read_url) as parquet:
        schema = parquet.schema_arrow
        if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
            raise InputError(
                f"shard {url}: it has more than one column '{twice[0]}', expected each name once. "
                "Rename one of them."
            )
        columns = find_columns(schema, url, config.layout, config.columns)
        wanted = set(columns.names.values())
        row_groups, text_bytes = [], 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            row_groups.append(group.num_rows)
            for number in range(group.num_columns):
                chunk = group.column(number)
                if chunk.path_in_schema.split(".")[0] in wanted:
                    text_bytes += chunk.total_uncompressed_size
    return Shard(
        url=url,
        read_url=read_url,
        size=entry.size,
        version=entry.version,
        columns=columns,
        schema=schema,
        row_groups=tuple(row_groups),
        text_bytes=text_bytes,
    )


def _ingest(entry: ObjectInfo, output: str) -> list[str]:
    """Turn one JSON file into Parquet pieces, unless that was done before; returns their URLs."""
    identity = f"{INGEST_VERSION}\n{entry.url}\n{entry.size}\n{entry.version}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = storage.join(storage.absolute(output), "ingest", key)
    done = storage.join(folder, "_DONE.json")
    if storage.exists(done):
        names = json.loads(storage.read_bytes(done))["pieces"]
        return [storage.join(folder, name) for name in names]
    names = []
    num_good = num_bad = 0
    for number, rows in enumerate(_pieces(_read_rows(entry.url))):
        num_good += sum(row is not None for row, _, _ in rows)
        num_bad += sum(row is None for row, _, _ in rows)
        name = f"piece-{number:05d}.parquet"
        storage.publish(storage.join(folder, name), _to_parquet(rows))
        names.append(name)
    if num_bad and not num_good:
        raise InputError(
            f"input {entry.url}: none of its {num_bad:,} lines is a JSON object. Expected one "
            "object per line, or one array of objects."
        )
    record = {"source": entry.url, "version": entry.version, "pieces": names}
    storage.publish(done, json.dumps(record, indent=1).encode())
    return [storage.join(folder, name) for name in names]


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
    compression = next((c for s, c in _COMPRESSIONS.items() if url.lower().endswith(s)), None)
    with storage.reading(url), fs.open(path, "rb") as raw:
        stream = pa.CompressedInputStream(raw, compression) if compression else raw
        lines = io.BufferedReader(stream, 1 << 20) if compression else stream
        is_array = seen = False
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
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
    except (ValueError, RecursionError) as err:  # bad JSON or bad UTF-8
        return None, f"{where}: {err}", where


def _as_row(value: Any, where: str) -> _Row:
    if not isinstance(value, dict):
        return None, f"{where}: got {type(value).__name__}, expected an object", where
    try:
        return {_storable(k): _storable(v) for k, v in value.items()}, None, where
    except _TooDeep:
        return None, f"{where}: nested deeper than {_MAX_DEPTH} levels", where


def _to_parquet(rows: list[_Row]) -> bytes:
    names: dict[str, None] = {}  # in order of appearance
    for row, _, _ in rows:
        names.update(dict.fromkeys(row or ()))
    reasons = [reason for _, reason, _ in rows]
    columns = {}
    for name in names:
        values = [None if row is None else row.get(name) for row, _, _ in rows]
        columns[name], faults = _column(values)
        for index, fault in faults.items():
            reasons[index] = reasons[index] or f"{rows[index][2]}: column '{name}': {fault}"
    columns[BAD_LINE] = pa.array(reasons, pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def _column(values: list[Any]) -> tuple[pa.Array, dict[int, str]]:
    """An Arrow column of JSON values of whatever types.

    Scalars of mixed types become text, each in its JSON spelling. Of lists and objects, the rows
    that do not fit the type of the rows before them become null, and are named.
    """
    try:
        return pa.array(values), {}
    except (pa.ArrowException, OverflowError):
        pass
    if not any(isinstance(v, (list, dict)) for v in values):
        text = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        return pa.array(text, pa.string()), {}
    kind: pa.DataType = pa.null()
    faults: dict[int, str] = {}
    for index, value in enumerate(values):
        try:
            seen = pa.schema([("v", pa.array([value]).type)])
            both = [pa.schema([("v", kind)]), seen]
            kind = pa.unify_schemas(both, promote_options="permissive").field("v").type
        except (pa.ArrowException, OverflowError) as err:
            faults[index] = str(err).splitlines()[0]
    kept = [None if index in faults else value for index, value in enumerate(values)]
    return pa.array(kept, kind), faults


class _TooDeep(ValueError):
    """A value that Parquet could hold but not give back."""


def _storable(value: Any, depth: int = 1) -> Any:
    """A JSON value as Parquet can hold it.

    JSON can spell lone surrogates, UTF-8 cannot: they become U+FFFD, as other readers do. An
    object without keys becomes null: Parquet has no struct without fields.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, (list, dict)) and depth == _MAX_DEPTH:
        raise _TooDeep
    if isinstance(value, list):
        return [_storable(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {_storable(k): _storable(v, depth + 1) for k, v in value.items()} or None
    return value
