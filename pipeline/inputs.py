"""The front door: whatever the corpus is stored as, behind it there are only Parquet shards.

Parquet is listed as it is; JSON and JSONL (also .gz, .zst) come through ingest.py. Sources that an
earlier run has seen are not opened again: see footers.py.
"""

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline import footers, listing, storage
from pipeline.config import InputConfig
from pipeline.errors import ChangedError, InputError, StorageError
from pipeline.footers import Footer, Known
from pipeline.ingest import COMPRESSIONS, SUFFIXES, ingest
from pipeline.input_paths import behind_links, hidden, overlap, refuse_overlap
from pipeline.layouts import LAYOUT_ORDER, Columns, find_columns
from pipeline.listing import ObjectInfo
from pipeline.schemas import BAD_LINE
from pipeline.storage_faults import is_outage
from pipeline.texts import count

log = logging.getLogger("cherry")

_INGESTING = threading.Semaphore(2)
"""Files of JSON that are parsed at once: each takes several times its text in memory."""


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
    all_bytes: int
    """Uncompressed bytes of all columns."""

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
    footers: Known = field(default_factory=dict, repr=False)
    """What was read, for `remember_footers`; empty where nothing is new."""


def open_corpus(config: InputConfig, output: str) -> Corpus:
    """List the input, ingest what is JSON, and read every footer.

    Raises:
        InputError: A path is missing, empty, forbidden, holds no known format, overlaps the
            output, or a shard is unreadable and `on_bad_shard` is `fail`.
    """
    sources = _list_sources(config, output)
    corpus = open_sources(sources, config, output)
    if corpus.footers:  # of which one may have been read after its file was overwritten
        now = set(_list_sources(config, output))
        if changed := [source.url for source in sources if source not in now]:
            raise ChangedError(
                f"input {changed[0]}: it was overwritten while its footer was read. Put new data "
                "beside shards that are in use, not over them, and run again."
            )
    return corpus


def open_sources(sources: list[ObjectInfo], config: InputConfig, output: str) -> Corpus:
    """Ingest what is JSON among files, and read every footer.

    Raises:
        InputError: None has rows, or one is unreadable and `on_bad_shard` is `fail`.
        StorageError: The store does not give one, and `on_bad_shard` is `skip`.
    """
    known = footers.load(output)
    new = [source for source in sources if source not in known]
    with ThreadPoolExecutor(max_workers=16) as pool:  # footers are small reads, mostly waiting
        fresh = dict(zip(new, pool.map(lambda source: _read(source, output), new), strict=True))
    read: Known = {}
    shards: list[Shard] = []
    skipped: list[str] = []
    for source in sources:
        footers_of = known[source] if source in known else fresh[source]
        opened: list[Shard] | InputError
        if isinstance(footers_of, InputError):
            opened = footers_of
        else:
            read[source] = footers_of
            opened = _open_source(source, footers_of, config)
        if isinstance(opened, InputError):
            if config.on_bad_shard == "fail":
                raise opened
            if is_outage(opened):  # else good shards would be left out
                raise StorageError(
                    f"input {opened} The file may be sound: run again when the store answers."
                ) from opened
            skipped.append(str(opened))
        else:
            shards.extend(opened)
    if not any(shard.num_rows for shard in shards):
        raise InputError(
            f"input {', '.join(config.paths)}: no rows in {count(len(sources), 'file')}."
            + "".join(f"\n{reason}" for reason in skipped)
        )
    return Corpus(tuple(shards), tuple(skipped), read if new or len(read) < len(known) else {})


def _list_sources(config: InputConfig, output: str) -> list[ObjectInfo]:
    """The files of all paths, each once, sorted by URL."""
    found: dict[str, ObjectInfo] = {}
    output = storage.absolute(output)
    for path in config.paths:
        path = storage.absolute(path)
        refuse_overlap(path, output)
        for entry in _list_path(path):
            if entry.url.startswith(f"{output}/") and not path.startswith(f"{output}/"):
                raise overlap(path, output)
            real = behind_links(entry.url, output)
            # Of a file and links to it the file itself, else the first by name.
            found[real] = min(found.get(real, entry), entry, key=lambda e: (e.url != real, e.url))
    return sorted(found.values(), key=lambda entry: entry.url)


def remember_footers(corpus: Corpus, output: str) -> None:
    """Keep what was read of the input for the next run."""
    if corpus.footers:
        footers.save(output, corpus.footers)


def _list_path(path: str) -> list[ObjectInfo]:
    try:
        entries = listing.list_objects(path)
    except InputError as err:
        raise InputError(f"input {err}") from None
    named = len(entries) == 1 and entries[0].url == path
    fitting = [e for e in entries if _format(e.url) and (named or not hidden(path, e.url))]
    if unknown := next((e for e in fitting if not e.version), None):
        raise InputError(
            f"input {unknown.url}: its store tells neither an ETag nor when it was written, so "
            "that nobody can see whether it changed since it was scored. Copy it to a disk or a "
            "bucket."
        )
    if fitting:
        if others := [e for e in entries if not _format(e.url) and not hidden(path, e.url)]:
            names = ", ".join(entry.url.rpartition("/")[2] for entry in others[:3])
            log.info("input %s: not read: %s (%s)", path, count(len(others), "other file"), names)
        return fitting
    if not entries:
        raise InputError(f"input {path}: nothing is there: an empty directory, or no match.")
    names = ", ".join(entry.url.rpartition("/")[2] for entry in entries[:3])
    raise InputError(
        f"input {path}: no Parquet inside, and no JSON: has {count(len(entries), 'other file')} "
        f"({names}). Expected .parquet, .json or .jsonl (also .gz, .zst)."
    )


def _format(url: str) -> str | None:
    name = url.lower()
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return "json" if name.endswith(SUFFIXES) else None


def _read(source: ObjectInfo, output: str) -> list[Footer] | InputError:
    try:
        if _format(source.url) == "parquet":
            return [footers.read_footer(source.url, source.url)]
        with _INGESTING:
            pieces = ingest(source, output)
        return [footers.read_footer(f"{source.url}#{n}", piece) for n, piece in enumerate(pieces)]
    except InputError as err:
        return err


def _open_source(
    source: ObjectInfo, read: list[Footer], config: InputConfig
) -> list[Shard] | InputError:
    try:
        return [_open_shard(source, footer, config) for footer in read]
    except InputError as err:
        return err


def _open_shard(source: ObjectInfo, footer: Footer, config: InputConfig) -> Shard:
    schema = footer.schema
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise InputError(
            f"shard {footer.url}: it has more than one column '{twice[0]}', expected each name "
            "once. Rename one of them."
        )
    if BAD_LINE in schema.names and footer.url == footer.read_url:
        raise InputError(
            f"shard {footer.url}: its column '{BAD_LINE}' is Cherry's own, of JSON that a run "
            "turned into Parquet. Give the JSON itself as input, or rename the column."
        )
    if schema.names == [BAD_LINE]:  # a piece of broken lines only: all its rows are malformed
        columns = Columns(LAYOUT_ORDER[0], {})
    else:
        columns = find_columns(schema, footer.url, config.layout, config.columns)
    return Shard(
        url=footer.url,
        read_url=footer.read_url,
        size=source.size,
        version=source.version,
        columns=columns,
        schema=schema,
        row_groups=footer.row_groups,
        text_bytes=sum(footer.column_bytes.get(name, 0) for name in columns.names.values()),
        all_bytes=sum(footer.column_bytes.values()),
    )
