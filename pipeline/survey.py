"""The survey: what one pass over the parts says, and which of their rows may be selected."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Context, Decimal
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipeline import storage
from pipeline.config import Ratio, SelectConfig
from pipeline.units import Plan

NUM_BINS = 1 << 16

_EXACT = Context(prec=1000)
"""0.1 and 0.10 are one setting, and no digit of a longer one is rounded away."""

_UNITS_PER_TASK = 64
_EXTREMES = 5


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
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
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


def to_keys(ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """float64 -> uint64 of the same order; -0.0 and 0.0 are one value. NaN has no place here.

    Negative numbers are complemented, others get their sign bit set:
    -1.0 -> 0x400fffffffffffff, 0.0 -> 0x8000000000000000, 1.0 -> 0xbff0000000000000.
    """
    assert not np.isnan(ratios).any()
    bits = (ratios + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def from_keys(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The inverse of `to_keys`."""
    sign = np.uint64(1 << 63)
    return np.where(keys & sign, keys ^ sign, ~keys).view(np.float64)


def tasks(plan: Plan) -> Iterator[tuple[int, list[str]]]:
    """(index of the first unit, part URLs) for each task."""
    for start in range(0, len(plan.units), _UNITS_PER_TASK):
        units = plan.units[start : start + _UNITS_PER_TASK]
        yield start, [plan.part_url(unit) for unit in units]


def survey_parts(plan: Plan, settings: SelectSettings) -> Survey:
    """Look at every part once, in Ray tasks."""
    total = Survey()
    jobs = [_survey_task.remote(urls, first, settings) for first, urls in tasks(plan)]
    for survey in ray.get(jobs):
        total.add(survey)
    return total


@ray.remote
def _survey_task(urls: list[str], first_unit: int, settings: SelectSettings) -> Survey:
    total = Survey()
    for unit, part in enumerate(read_parts(urls, settings), start=first_unit):
        total.rows_by_status.update(part["status"].to_pylist())
        eligible, rejected = eligible_rows(part, settings)
        total.rejected += rejected
        kept = part.filter(eligible)
        ratios = kept[settings.by].to_numpy()
        bins = (to_keys(ratios) >> np.uint64(48)).astype(np.int64)
        total.histogram += np.bincount(bins, minlength=NUM_BINS)
        for name, direction in (("highest", "descending"), ("lowest", "ascending")):
            order = pc.sort_indices(kept, [(settings.by, direction), ("row_index", "ascending")])
            ends = kept.take(order[:_EXTREMES])
            rows = zip(ends[settings.by].to_pylist(), ends["row_index"].to_pylist(), strict=True)
            getattr(total, name).extend((ratio, unit, row) for ratio, row in rows)
    merged = Survey()
    merged.add(total)
    return merged


def read_parts(urls: list[str], settings: SelectSettings) -> Iterator[pa.Table]:
    """The columns of parts that a selection goes by, in order."""
    names = ["row_index", "sample_id", "status", "num_response_tokens", settings.by]
    for data in storage.read_many(urls):
        yield pq.read_table(pa.BufferReader(data), columns=names)


def eligible_rows(part: pa.Table, settings: SelectSettings) -> tuple[pa.Array, Counter[str]]:
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
