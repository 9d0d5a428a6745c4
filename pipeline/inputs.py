"""The front door: whatever the corpus is stored as, behind it there are only Parquet shards.

Parquet is listed as it is; JSON and JSONL (also .gz, .zst) come through ingest.py.
"""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipeline import storage
from pipeline.config import InputConfig
from pipeline.errors import InputError
from pipeline.ingest import COMPRESSIONS, SUFFIXES, ingest
from pipeline.samples import LAYOUT_ORDER, Columns, find_columns
from pipeline.schemas import BAD_LINE
from pipeline.storage import ObjectInfo


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

    @property
    def ingested(self) -> bool:
        """Whether it was JSON."""
        return self.url != self.read_url


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
    try:
        entries = storage.list_objects(path)
    except InputError as err:
        raise InputError(f"input {err}") from None
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
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return "json" if name.endswith(SUFFIXES) else None


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
        pieces = ingest(entry, output)
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
        if schema.names == [BAD_LINE]:  # a piece of broken lines only: all its rows are malformed
            columns = Columns(LAYOUT_ORDER[0], {})
        else:
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
