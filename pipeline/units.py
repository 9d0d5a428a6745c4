"""Work units: which rows are scored together, and what names the result.

A unit is a row range of one shard. Its id hashes everything that can change its rows or their
scores, and names its part, ``<output>/scores/<score_fp>/<unit_id>.parquet``: a part that exists is
a unit that is done.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline import listing, storage
from pipeline.ingest import INGEST_VERSION
from pipeline.inputs import Corpus, Shard
from pipeline.layouts import Columns
from pipeline.listing import ObjectInfo
from pipeline.samples import CANONICALISER_VERSION

_BYTES_PER_TOKEN = 4
_PASSES = 2  # conditioned and direct
_SMALL_MODEL_PARAMETERS = 20_000_000
_UNIT_TOKENS = 2**17
_UNIT_TOKENS_SMALL = 2**20


@dataclass(frozen=True)
class Unit:
    """A row range of one shard."""

    unit_id: str
    shard_url: str
    read_url: str
    columns: Columns
    start: int
    """First row in the shard."""
    stop: int
    """One past the last row."""
    score_fp: str
    input_fp: str
    size: int = 0
    version: str = ""
    """Of the file, as it was listed; none for a piece of ingested JSON, which never changes."""

    @property
    def file(self) -> ObjectInfo:
        """Where its rows are, and as of when."""
        return ObjectInfo(self.read_url, self.size, self.version)

    @property
    def num_rows(self) -> int:
        """Rows of the unit."""
        return self.stop - self.start

    def part_url(self, scores_url: str) -> str:
        """Where its part is, or will be."""
        return storage.join(scores_url, f"{self.unit_id}.parquet")

    def to_json(self) -> str:
        """As it travels to the stages and into a part's metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        """The inverse of `to_json`."""
        raw = json.loads(text)
        return cls(**{**raw, "columns": Columns(**raw["columns"])})


@dataclass(frozen=True)
class Plan:
    """All units of a corpus under one score fingerprint, in the order of shards and rows."""

    units: tuple[Unit, ...]
    scores_url: str
    rows_by_shard: dict[str, int]
    """As the footers say, at most `max_rows` in all."""

    @property
    def fingerprint(self) -> str:
        """Of what was asked of the model: the name of the parts' directory."""
        return self.scores_url.rpartition("/")[2]

    @property
    def num_rows(self) -> int:
        """Rows of all units."""
        return sum(unit.num_rows for unit in self.units)

    def part_url(self, unit: Unit) -> str:
        """Where the unit's part is, or will be."""
        return unit.part_url(self.scores_url)

    def parts(self) -> set[str]:
        """Unit ids of the parts that are there, this plan's and older ones': one listing."""
        names = listing.list_names(self.scores_url)
        found = {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}
        return {unit_id for unit_id in found if not unit_id.startswith(".")}

    def pending(self, parts: set[str]) -> list[Unit]:
        """The units that have no part yet, going by a listing from `parts`."""
        return [unit for unit in self.units if unit.unit_id not in parts]

    def stale(self, parts: set[str]) -> list[str]:
        """URLs of parts that no unit names: of shards that are gone or were rewritten."""
        strays = sorted(parts - {unit.unit_id for unit in self.units})
        return [storage.join(self.scores_url, f"{unit_id}.parquet") for unit_id in strays]

    def without(self, unit_ids: set[str]) -> "Plan":
        """The plan less some units, whose shards were skipped."""
        rows = Counter(self.rows_by_shard)
        for unit in self.units:
            if unit.unit_id in unit_ids:
                rows[unit.shard_url] -= unit.num_rows
        kept = tuple(unit for unit in self.units if unit.unit_id not in unit_ids)
        return Plan(kept, self.scores_url, dict(rows))


def make_plan(
    corpus: Corpus,
    output: str,
    score_fp: str,
    unit_rows: int | Literal["auto"],
    num_parameters: int,
    max_rows: int | None,
    folder: str = "scores",
) -> Plan:
    """Cut a corpus into units.

    A pure function of footers and settings: never of the cluster or of measured speed, so that
    every run of the same input plans the same units.

    Args:
        corpus: The shards.
        output: The run's output.
        score_fp: Of the scoring settings.
        unit_rows: Rows of a unit, or `auto`: about 131,072 tokens of both passes (8 s of a 7B
            model on an H100, two minutes of 135M on two CPU cores), a million for models under
            20M parameters.
        num_parameters: Of the model.
        max_rows: Only the first so many rows.
        folder: Of the parts, under the output.
    """
    units: list[Unit] = []
    rows_by_shard: dict[str, int] = {}
    left = max_rows
    for shard in corpus.shards:
        rows_by_shard[shard.url] = shard.num_rows if left is None else min(shard.num_rows, left)
        target = auto_unit_rows(shard, num_parameters) if unit_rows == "auto" else unit_rows
        for start, stop in cut_rows(shard.row_groups, target):
            if left is not None:
                stop = min(stop, start + left)
                left -= stop - start
            if stop > start:
                units.append(_unit(shard, start, stop, score_fp))
    scores_url = storage.join(storage.absolute(output), folder, score_fp)
    return Plan(tuple(units), scores_url, rows_by_shard)


def auto_unit_rows(shard: Shard, num_parameters: int) -> int:
    """Rows that hold about a unit's worth of tokens, going by the footer's text bytes."""
    small = num_parameters < _SMALL_MODEL_PARAMETERS
    budget = _UNIT_TOKENS_SMALL if small else _UNIT_TOKENS
    tokens_per_row = _PASSES * shard.text_bytes / max(1, shard.num_rows) / _BYTES_PER_TOKEN
    return max(1, round(budget / max(1.0, tokens_per_row)))


def cut_rows(row_groups: tuple[int, ...], target: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `target` rows: small row groups whole and together, large ones sliced.

    Example:
        `cut_rows((3, 3, 3, 10), 5) -> (0, 6), (6, 9), (9, 14), (14, 19)`
    """
    start = stop = 0
    for num_rows in row_groups:
        pieces = -(-num_rows // target)
        if pieces > 1:
            if stop > start:
                yield start, stop
            for piece in range(pieces):
                yield (
                    stop + num_rows * piece // pieces,
                    stop + num_rows * (piece + 1) // pieces,
                )
            start = stop = stop + num_rows
            continue
        stop += num_rows
        if stop - start >= target:
            yield start, stop
            start = stop
    if stop > start:
        yield start, stop


def fingerprint(values: dict[str, object]) -> str:
    """Short hash of resolved settings: 64 bits of SHA-256 over sorted JSON."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unit(shard: Shard, start: int, stop: int, score_fp: str) -> Unit:
    input_fp = fingerprint(
        {
            "layout": shard.columns.layout,
            "columns": shard.columns.names,
            "canonicaliser_version": CANONICALISER_VERSION,
            "ingest_version": INGEST_VERSION,
        }
    )
    identity = [shard.url, shard.size, shard.version, start, stop, score_fp, input_fp]
    unit_id = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return Unit(
        unit_id=unit_id,
        shard_url=shard.url,
        read_url=shard.read_url,
        columns=shard.columns,
        start=start,
        stop=stop,
        score_fp=score_fp,
        input_fp=input_fp,
        size=0 if shard.ingested else shard.size,
        version="" if shard.ingested else shard.version,
    )
