"""The estimate of `cherry plan`: what a run would score and what it takes, before it is paid for.

::

    lengths   of up to 50,000 rows, in blocks that lie evenly over the units without a part
    tokens    of 4,000 of these; tokens follow characters, which are known of all 50,000
    scores    if asked, of some hundred of them, in a process like the ones of a run

Nothing is written but what every command keeps: the resolved config, and footers of the input.
"""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline import cluster, reuse
from pipeline.errors import ChangedError, InputError
from pipeline.job import Job
from pipeline.rows import take_rows
from pipeline.samples import Sample, read_samples, sample_id
from pipeline.schemas import BAD_LINE, PART
from pipeline.scoring import UnitScorer
from pipeline.settings import Scoring
from pipeline.storage_faults import is_outage
from pipeline.tokenising import renderer, tokenise
from pipeline.units import Unit

log = logging.getLogger("cherry")

_MOST_LENGTHS = 50_000
_BLOCK_ROWS = 500
_MOST_TOKENISED = 4_000
_READERS = 8
_WARM_UP_ROWS = 16
"""Scored before the clock runs: the first rows also pay for what the device sets up once."""


@dataclass(frozen=True)
class Estimate:
    """What a run would do. Tokens are sequence lengths, as in a run's summary."""

    rows: int
    rows_done: int
    """In units that have a part."""
    rows_reusable: int
    """Estimated: of the others, those whose score is known from a shard that was rewritten."""
    units_total: int
    units_done: int
    sampled_rows: int
    tokens_conditioned: int
    """Estimated, of rows that are neither done nor reusable."""
    tokens_direct: int
    tokens_error: float
    """Standard error of the sum of both, as a share of it."""
    rows_by_status: dict[str, int]
    """Estimated, of rows that are not done, as far as tokenising tells."""
    device: str
    skipped_shards: int = 0
    """That a run would skip. One whose footer is sound counts only if rows of it were drawn."""
    scored_rows: int = 0
    over_one_fraction: float | None = None
    """Of the scored rows: IFD of 1 or more."""
    seconds_per_million_tokens: float | None = None
    """Of one model on this cluster's kind of device, loading left out."""
    model_hours: float | None = None
    """One resident model's time: divide by the number of actors."""
    cost: float | None = None
    """Model hours times `cluster.price_per_gpu_hour`, whatever the number of actors."""

    @property
    def tokens(self) -> int:
        """Of both passes."""
        return self.tokens_conditioned + self.tokens_direct


def estimate(job: Job, num_scored: int) -> Estimate:
    """Estimate what a run of `job` would do; `num_scored` rows are scored to see how long it takes.

    Raises:
        InputError: A shard cannot be read, and `on_bad_shard` is `fail`.
        ConfigError: The cluster cannot hold the actors asked for.
    """
    parts = job.plan.parts()
    pending = job.plan.pending(parts)
    samples, unreadable = _read(job, pending)
    if unreadable:
        job = replace(job, plan=job.plan.without({unit.unit_id for unit in unreadable}))
        pending = job.plan.pending(parts)
    rows_pending = sum(unit.num_rows for unit in pending)
    workers = cluster.plan_workers(job.config.cluster)
    scoring = Scoring(
        settings=job.settings,
        scores_url=job.plan.scores_url,
        workers=workers,
        timeout_s=job.config.score.unit_timeout_s,
    )
    known = _known(job, parts, samples)
    chars = np.array([sum(len(m.content) for m in sample.messages) for sample in samples])
    chosen = np.arange(0, len(samples), max(1, -(-len(samples) // _MOST_TOKENISED)))
    table = tokenise(chosen, [samples[i] for i in chosen], job.settings)
    sides = _num_tokens(table, len(renderer(job.settings).prefix_ids))
    sides[:, known[chosen]] = 0
    totals = [_total(side, chars[chosen], chars, rows_pending) for side in (*sides, sides.sum(0))]
    statuses = Counter(table["status"].to_pylist())
    found = Estimate(
        rows=job.plan.num_rows,
        rows_done=job.plan.num_rows - rows_pending,
        rows_reusable=round(rows_pending * float(known.mean())) if len(samples) else 0,
        units_total=len(job.plan.units),
        units_done=len(job.plan.units) - len(pending),
        sampled_rows=len(chosen),
        tokens_conditioned=totals[0][0],
        tokens_direct=totals[1][0],
        tokens_error=totals[2][1] / max(1, totals[2][0]),
        rows_by_status={
            status: round(count * rows_pending / len(chosen))
            for status, count in sorted(statuses.items())
        },
        device=scoring.device,
        skipped_shards=len(job.corpus.skipped) + len({unit.shard_url for unit in unreadable}),
    )
    return _with_scores(found, table, scoring, num_scored, job) if num_scored else found


def _drawn(rows: int) -> npt.NDArray[np.int64]:
    """Numbers of the rows to read: all, or blocks at equal distances."""
    if rows <= _MOST_LENGTHS:
        return np.arange(rows)
    blocks = _MOST_LENGTHS // _BLOCK_ROWS
    starts = np.arange(blocks) * (rows - _BLOCK_ROWS) // (blocks - 1)
    return np.unique(np.add.outer(starts, np.arange(_BLOCK_ROWS)))


def _read(job: Job, units: Sequence[Unit]) -> tuple[list[Sample], list[Unit]]:
    """Samples drawn from the rows of units, and the units of shards that a run would skip."""
    ends = np.cumsum([unit.num_rows for unit in units])
    drawn = _drawn(sum(unit.num_rows for unit in units))
    by_unit = np.searchsorted(ends, drawn, side="right")
    jobs = []
    for _, group in itertools.groupby(
        np.unique(by_unit).tolist(), key=lambda index: units[index].read_url
    ):
        rows = []
        for index in group:
            unit = units[index]
            rows.append(drawn[by_unit == index] - (ends[index] - unit.num_rows) + unit.start)
        jobs.append((unit, np.concatenate(rows)))
    skip = job.config.input.on_bad_shard == "skip"
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda each: _take(each[0], each[1], skip), jobs))
    bad = {
        unit.shard_url for samples, (unit, _) in zip(found, jobs, strict=True) if samples is None
    }
    samples = [sample for some in found if some is not None for sample in some]
    return samples, [unit for unit in units if unit.shard_url in bad]


def _take(unit: Unit, rows: npt.NDArray[np.int64], skip: bool) -> list[Sample] | None:
    """Samples of a shard; None if it cannot be read and is to be skipped."""
    try:
        table = take_rows(unit.file, rows, [*unit.columns.names.values(), BAD_LINE])
        return list(read_samples(table, unit.columns))
    except InputError as err:
        if not skip or isinstance(err, ChangedError) or is_outage(err):
            raise
        log.warning("%s", err)
        return None


def _known(job: Job, parts: set[str], samples: Sequence[Sample]) -> npt.NDArray[np.bool_]:
    """Which samples have a score already, though their unit has no part."""
    known = np.zeros(len(samples), np.bool_)
    stale = job.plan.stale(parts)
    if stale and len(samples) and job.config.score.reuse == "rows":
        ids = [None if s.malformed else sample_id(s.messages) for s in samples]
        known[reuse.find(reuse.gather(stale), ids)[0]] = True
    return known


def _num_tokens(table: pa.Table, num_prefix: int) -> npt.NDArray[np.int64]:
    """Tokens of the conditioned and of the direct passes of each row: shape (2, rows)."""
    sides = np.zeros((2, len(table)), np.int64)
    rows = zip(
        table["status"].to_pylist(), table["input_ids"], table["turns"].to_pylist(), strict=True
    )
    for at, (status, ids, turns) in enumerate(rows):
        if status == "ok":
            sides[0, at] = len(ids)
            sides[1, at] = sum(
                num_prefix + end - start for start, _, scored, end in turns if end > scored
            )
    return sides


def _total(
    tokens: npt.NDArray[np.int64],
    chars: npt.NDArray[np.int64],
    all_chars: npt.NDArray[np.int64],
    rows: int,
) -> tuple[int, float]:
    """Tokens of all rows, and the standard error of that.

    A regression estimator: the mean of the tokenised rows, corrected by how much their characters
    differ from those of all rows that were read.

    Source: Cochran, Sampling Techniques, 1977, section 12.6 (double sampling for regression).
    """
    if not len(tokens):
        return 0, 0.0
    spread = float(chars.var())
    slope = float(np.cov(chars, tokens, bias=True)[0, 1]) / spread if spread else 0.0
    mean = float(tokens.mean()) + slope * float(all_chars.mean() - chars.mean())
    residual = tokens - slope * chars
    fresh = residual.var() * (1 - len(tokens) / rows) / len(tokens)
    drawn = (slope**2 * spread) * (1 - len(all_chars) / rows) / len(all_chars)
    return round(rows * mean), rows * math.sqrt(max(0.0, fresh + drawn))


def _with_scores(
    found: Estimate, table: pa.Table, scoring: Scoring, num_scored: int, job: Job
) -> Estimate:
    ok = table.filter(pa.compute.equal(table["status"], "ok"))
    at = np.arange(0, len(ok), max(1, len(ok) // num_scored))[:num_scored]
    some = ok.take(pa.array(at))
    if not len(some):
        return found
    options = {"num_cpus": scoring.workers.num_cpus, "num_gpus": scoring.workers.num_gpus}
    make: Any = _TimedScorer
    actor = make.options(**options).remote(scoring)
    ratios, num_tokens, seconds = ray.get(actor.score.remote(some, job.config.preset.ratio))
    ray.kill(actor)
    per_million = 1e6 * seconds / num_tokens
    hours = found.tokens * per_million / 1e6 / 3600
    price = job.config.cluster.price_per_gpu_hour
    return replace(
        found,
        scored_rows=len(ratios),
        over_one_fraction=sum(r >= 1 for r in ratios) / max(1, len(ratios)),
        seconds_per_million_tokens=per_million,
        model_hours=hours,
        cost=None if price is None else hours * price * (scoring.workers.num_gpus or 1),
    )


@ray.remote
class _TimedScorer:
    """A scoring process, timed."""

    def __init__(self, scoring: Scoring) -> None:
        self._scorer = UnitScorer(scoring)

    def score(self, tokens: pa.Table, ratio: str) -> tuple[list[float], int, float]:
        """Ratios of the rows, tokens of both passes, and seconds."""
        self._scorer.score("{}", tokens.slice(0, _WARM_UP_ROWS), PART.empty_table())
        begun = time.monotonic()
        part, num_tokens, _ = self._scorer.score("{}", tokens, PART.empty_table())
        seconds = time.monotonic() - begun
        return part[ratio].drop_null().to_pylist(), num_tokens, seconds
