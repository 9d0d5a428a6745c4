"""Selection: the globally best rows, exactly, from parts; no model and no sort of the corpus.

::

    survey   a task per group of parts: counts, and a histogram of the keys' top 16 bits
    cut      the highest bin down to which enough eligible rows lie
    gather   a task per group of parts: (key, id, unit, row) of the rows at or over the cut
    rank     key, then sample_id, then shard and row; the first copy of a sample_id is kept
    write    see subset.py

A key is a float64 ratio as an unsigned integer of the same order. Rows come out sorted by rank, so
that any prefix of the output is itself a smaller cherry subset. A pure function of parts, inputs
and settings: neither the number of workers nor times or absolute paths reach the output.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import storage
from pipeline.config import Ratio, SelectConfig
from pipeline.inputs import Corpus
from pipeline.subset import WRITER_VERSION, output_schema, write_subset
from pipeline.units import Plan, fingerprint

_EXACT = Context(prec=1000)
"""0.1 and 0.10 are one setting, and no digit of a longer one is rounded away."""

_UNITS_PER_TASK = 64
_BINS = 1 << 16
_EXTREMES = 5

_CANDIDATE = np.dtype([("key", "<u8"), ("sample_id", "S16"), ("unit", "<u4"), ("row", "<i8")])
"""A row that may be selected, 36 bytes. numpy pads S16 with zero bytes when it compares, which
changes nothing between values that are all 16 bytes long."""


@dataclass(frozen=True)
class SelectSettings:
    """Resolved selection settings."""

    by: Ratio
    fraction: str | None
    """An exact decimal."""
    count: int | None
    threshold: float | None
    of: Literal["all", "scored", "eligible"]
    min_ifd: float | None
    max_ifd: float | None
    min_response_tokens: int

    @classmethod
    def from_config(cls, config: SelectConfig, by: Ratio) -> "SelectSettings":
        """Fill in the default budget: a fraction of 0.10."""
        fraction = config.fraction
        if fraction is None and config.count is None and config.threshold is None:
            fraction = Decimal("0.10")
        return cls(
            by=by,
            fraction=None if fraction is None else str(fraction.normalize(_EXACT)),
            count=config.count,
            threshold=config.threshold,
            of=config.of,
            min_ifd=config.min_ifd,
            max_ifd=config.max_ifd,
            min_response_tokens=config.min_response_tokens,
        )


@dataclass
class Survey:
    """What one pass over the parts says."""

    rows_by_status: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows with status ok that are not eligible, by reason."""
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    """Eligible rows by the top 16 bits of their key."""
    highest: list[tuple[float, int, int]] = field(default_factory=list)
    """Of the eligible rows: (ratio, unit, row), highest first."""
    lowest: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def scored(self) -> int:
        """Rows with status ok."""
        return self.rows_by_status["ok"]

    @property
    def eligible(self) -> int:
        """Rows that may be selected."""
        return int(self.histogram.sum())

    def add(self, other: "Survey") -> None:
        """Merge another survey into this one."""
        self.rows_by_status += other.rows_by_status
        self.rejected += other.rejected
        self.histogram += other.histogram
        order = sorted(self.highest + other.highest, key=lambda e: (-e[0], e[1], e[2]))
        self.highest = order[:_EXTREMES]
        self.lowest = sorted(self.lowest + other.lowest)[:_EXTREMES]


@dataclass(frozen=True)
class Selection:
    """A finished selection."""

    url: str
    manifest_url: str
    manifest: dict[str, Any]
    """Counts, cut and parts, as stored."""


def select(
    plan: Plan, corpus: Corpus, output: str, settings: SelectSettings, score_fp: str
) -> tuple[Selection, Survey]:
    """Select from finished parts and write the cherry subset, its manifest last.

    A selection whose manifest exists is not written again.
    """
    schema = output_schema(corpus)
    survey = _survey_parts(plan, settings)
    select_fp = fingerprint(
        {
            "score_fp": score_fp,
            "units": [unit.unit_id for unit in plan.units],
            "settings": asdict(settings),
            "writer_version": WRITER_VERSION,
        }
    )
    root = storage.join(storage.absolute(output), "cherry")
    url = storage.join(root, select_fp)
    manifest_url = storage.join(url, "_MANIFEST.json")
    if storage.exists(manifest_url):
        manifest = json.loads(storage.read_bytes(manifest_url))
    else:
        budget = _budget(settings, plan.num_rows, survey)
        chosen, duplicates = _choose(plan, settings, survey, budget)
        parts = write_subset(plan, chosen["unit"], chosen["row"], schema, url)
        manifest = {
            "score_fingerprint": score_fp,
            "select_fingerprint": select_fp,
            "settings": asdict(settings),
            "rows": plan.num_rows,
            "rows_by_status": dict(sorted(survey.rows_by_status.items())),
            "eligible_rows": survey.eligible,
            "rejected_rows": dict(sorted(survey.rejected.items())),
            "asked_rows": budget,
            "selected_rows": len(chosen),
            "duplicate_rows": duplicates,
            "cut": float(_from_keys(chosen["key"][-1:])[0]) if len(chosen) else None,
            "parts": parts,
        }
        storage.publish(manifest_url, json.dumps(manifest, indent=1).encode())
    latest = {"manifest": f"cherry/{select_fp}/_MANIFEST.json"}
    storage.replace_if_unchanged(
        storage.join(storage.absolute(output), "LATEST.json"), json.dumps(latest, indent=1).encode()
    )
    return Selection(url, manifest_url, manifest), survey


def to_keys(ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """float64 -> uint64 of the same order; -0.0 and 0.0 are one value. NaN has no place here.

    Negative numbers are complemented, others get their sign bit set:
    -1.0 -> 0x400fffffffffffff, 0.0 -> 0x8000000000000000, 1.0 -> 0xbff0000000000000.
    """
    assert not np.isnan(ratios).any()
    bits = (ratios + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def _from_keys(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    sign = np.uint64(1 << 63)
    return np.where(keys & sign, keys ^ sign, ~keys).view(np.float64)


def _budget(settings: SelectSettings, num_rows: int, survey: Survey) -> int | None:
    """Rows to keep at most; None is all that pass the threshold.

    The fraction is an exact decimal: 0.29 of 100 rows is 29, though 0.29 * 100 < 29 in floats.
    """
    if settings.threshold is not None:
        return None
    if settings.count is not None:
        return settings.count
    of = {"all": num_rows, "scored": survey.scored, "eligible": survey.eligible}[settings.of]
    return math.floor(Fraction(settings.fraction or "0") * of)


def _choose(
    plan: Plan, settings: SelectSettings, survey: Survey, budget: int | None
) -> tuple[npt.NDArray[Any], int]:
    """The selected rows in the order of their ranks, and the duplicates passed over.

    Starts with the bins that hold `budget` rows. If duplicates among them leave too few, the cut
    moves down by as many rows as are missing, until there are enough or no row is left.
    """
    if budget == 0 or survey.eligible == 0:
        return np.empty(0, _CANDIDATE), 0
    at_least = None
    if settings.threshold is not None:
        at_least = int(to_keys(np.array([settings.threshold]))[0])
    from_top = np.cumsum(survey.histogram[::-1])
    wanted = survey.eligible if budget is None else budget
    upper = _BINS
    ranked = np.empty(0, _CANDIDATE)
    while True:
        position = int(np.searchsorted(from_top, min(wanted, survey.eligible)))
        lower = _BINS - 1 - position
        found = _gather(plan, settings, max(lower << 48, at_least or 0), upper << 48)
        ranked = np.concatenate([ranked, _rank(found)])  # all of it ranks below what is there
        unique = _first_copies(ranked)
        if budget is None or unique.sum() >= budget or from_top[position] == survey.eligible:
            break
        wanted = int(from_top[position]) + budget - int(unique.sum())
        upper = lower
    chosen = ranked[unique][:budget]
    # Where the budget is not reached, all that is eligible was looked at.
    looked_at = len(ranked)
    if budget is not None and len(chosen) == budget:
        looked_at = int(np.flatnonzero(unique)[budget - 1]) + 1
    return chosen, looked_at - len(chosen)


def _rank(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """High keys first; ties by sample_id, then shard and row."""
    order = np.lexsort((rows["row"], rows["unit"], rows["sample_id"], ~rows["key"]))
    return rows[order]


def _first_copies(ranked: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """True on the copy of each sample_id that ranks first."""
    _, first = np.unique(ranked["sample_id"], return_index=True)
    mask = np.zeros(len(ranked), np.bool_)
    mask[first] = True
    return mask


def _tasks(plan: Plan) -> Iterator[tuple[int, list[str]]]:
    """(index of the first unit, part URLs) for each task."""
    for start in range(0, len(plan.units), _UNITS_PER_TASK):
        units = plan.units[start : start + _UNITS_PER_TASK]
        yield start, [plan.part_url(unit) for unit in units]


def _survey_parts(plan: Plan, settings: SelectSettings) -> Survey:
    total = Survey()
    jobs = [_survey_task.remote(urls, first, settings) for first, urls in _tasks(plan)]
    for survey in ray.get(jobs):
        total.add(survey)
    return total


def _gather(plan: Plan, settings: SelectSettings, low: int, high: int) -> npt.NDArray[Any]:
    """Eligible rows with low <= key < high."""
    jobs = [_gather_task.remote(u, first, settings, low, high) for first, u in _tasks(plan)]
    return np.concatenate(ray.get(jobs))


@ray.remote
def _survey_task(urls: list[str], first_unit: int, settings: SelectSettings) -> Survey:
    total = Survey()
    for unit, url in enumerate(urls, start=first_unit):
        part = _read_part(url, settings)
        total.rows_by_status.update(part["status"].to_pylist())
        eligible, rejected = _eligible(part, settings)
        total.rejected += rejected
        kept = part.filter(eligible)
        ratios = kept[settings.by].to_numpy()
        bins = (to_keys(ratios) >> np.uint64(48)).astype(np.int64)
        total.histogram += np.bincount(bins, minlength=_BINS)
        for name, direction in (("highest", "descending"), ("lowest", "ascending")):
            order = pc.sort_indices(kept, [(settings.by, direction), ("row_index", "ascending")])
            ends = kept.take(order[:_EXTREMES])
            rows = zip(ends[settings.by].to_pylist(), ends["row_index"].to_pylist(), strict=True)
            getattr(total, name).extend((ratio, unit, row) for ratio, row in rows)
    merged = Survey()
    merged.add(total)
    return merged


@ray.remote
def _gather_task(
    urls: list[str], first_unit: int, settings: SelectSettings, low: int, high: int
) -> npt.NDArray[Any]:
    found = []
    for unit, url in enumerate(urls, start=first_unit):
        part = _read_part(url, settings)
        part = part.filter(_eligible(part, settings)[0])
        keys = to_keys(part[settings.by].to_numpy())
        inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))
        kept = part.filter(pa.array(inside))
        rows = np.empty(len(kept), _CANDIDATE)
        rows["key"] = keys[inside]
        rows["sample_id"] = _ids(kept["sample_id"])
        rows["unit"] = unit
        rows["row"] = kept["row_index"].to_numpy()
        found.append(rows)
    return np.concatenate(found)


def _read_part(url: str, settings: SelectSettings) -> pa.Table:
    names = ["row_index", "sample_id", "status", "num_response_tokens", settings.by]
    with storage.open_parquet(url) as parquet:
        return parquet.read(columns=names)


def _eligible(part: pa.Table, settings: SelectSettings) -> tuple[pa.Array, Counter[str]]:
    """Which rows may be selected, and why rows with status ok may not (the first reason)."""
    ratio = part[settings.by]
    remaining = pc.equal(part["status"], "ok")
    rejected: Counter[str] = Counter()
    rules: list[tuple[str, Any]] = [
        ("too_few_tokens", pc.less(part["num_response_tokens"], settings.min_response_tokens))
    ]
    if settings.max_ifd is not None:
        rules.append(("at_or_over_max_ifd", pc.greater_equal(ratio, settings.max_ifd)))
    if settings.min_ifd is not None:
        rules.append(("under_min_ifd", pc.less(ratio, settings.min_ifd)))
    for reason, hit in rules:
        hit = pc.and_(remaining, pc.fill_null(hit, False))
        if count := pc.sum(hit).as_py():
            rejected[reason] = count
        remaining = pc.and_not(remaining, hit)
    return remaining, rejected


def _ids(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """fixed_size_binary(16) as a numpy array, without a Python object per row."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.binary(16))
    start = array.offset * 16
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)[start : start + len(array) * 16]
    return data.view("S16") if len(data) else np.empty(0, "S16")
