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
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline import storage
from pipeline.accounting import Audit
from pipeline.errors import InputError, StorageError
from pipeline.inputs import Corpus
from pipeline.schemas import ids_of
from pipeline.subset import WRITER_VERSION, output_schema, write_subset
from pipeline.survey import (
    NUM_BINS,
    SelectSettings,
    Survey,
    eligible_rows,
    from_keys,
    read_parts,
    survey_parts,
    tasks,
    to_keys,
)
from pipeline.units import Plan, fingerprint

_CANDIDATE = np.dtype([("key", "<u8"), ("sample_id", "S16"), ("unit", "<u4"), ("row", "<i8")])
"""A row that may be selected, 36 bytes. numpy pads S16 with zero bytes when it compares, which
changes nothing between values that are all 16 bytes long."""


@dataclass(frozen=True)
class Selection:
    """A finished selection."""

    url: str
    manifest_url: str
    manifest: dict[str, Any]
    """Counts, cut and parts, as stored."""


def select(
    plan: Plan,
    corpus: Corpus,
    output: str,
    settings: SelectSettings,
    score_fp: str,
    audited: Audit,
) -> tuple[Selection, Survey | None]:
    """Select from finished parts and write the cherry subset, its manifest last.

    A selection whose manifest exists is not made again, and has no survey. Its fingerprint holds
    the hashes of the parts, so that the same units with other bytes (rescored errors, or deleted
    parts that another kind of device scored again) make another subset.

    Raises:
        StorageError: Parts changed while they were selected from.
    """
    schema = output_schema(corpus)
    select_fp = fingerprint(
        {
            "score_fp": score_fp,
            "units": [unit.unit_id for unit in plan.units],
            "parts": audited.digest,
            "settings": asdict(settings),
            "writer_version": WRITER_VERSION,
        }
    )
    root = storage.join(storage.absolute(output), "cherry")
    url = storage.join(root, select_fp)
    manifest_url = storage.join(url, "_MANIFEST.json")
    survey = None
    if storage.exists(manifest_url):
        manifest = json.loads(storage.read_bytes(manifest_url))
    else:
        survey = survey_parts(plan, settings)
        budget = _budget(settings, plan.num_rows, survey)
        chosen, duplicates = _choose(plan, settings, survey, budget)
        parts = write_subset(plan, chosen["unit"], chosen["row"], schema, url)
        manifest = {
            "score_fingerprint": score_fp,
            "select_fingerprint": select_fp,
            "score_parts": {"count": len(audited.entries), "sha256": audited.digest},
            "settings": asdict(settings),
            "rows": plan.num_rows,
            "rows_by_status": dict(sorted(survey.rows_by_status.items())),
            "eligible_rows": survey.eligible,
            "rejected_rows": dict(sorted(survey.rejected.items())),
            "asked_rows": budget,
            "selected_rows": len(chosen),
            "duplicate_rows": duplicates,
            "cut": float(from_keys(chosen["key"][-1:])[0]) if len(chosen) else None,
            "parts": parts,
        }
        if changed := audited.changed(plan):
            raise StorageError(
                f"{plan.scores_url}: {len(changed)} parts changed while they were selected from, "
                f"the first is {changed[0]}.parquet. Another run rescores or deletes them: let it "
                "end, then run cherry select."
            )
        storage.publish(manifest_url, json.dumps(manifest, indent=1).encode())
    _point_latest(output, {"manifest": f"cherry/{select_fp}/_MANIFEST.json"})
    return Selection(url, manifest_url, manifest), survey


def _point_latest(output: str, latest: dict[str, str]) -> None:
    url = storage.join(storage.absolute(output), "LATEST.json")
    data = json.dumps(latest, indent=1).encode()
    with suppress(InputError):  # none yet
        if storage.read_bytes(url) == data:
            return
    storage.replace_if_unchanged(url, data)


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
    upper = NUM_BINS
    ranked = np.empty(0, _CANDIDATE)
    while True:
        position = int(np.searchsorted(from_top, min(wanted, survey.eligible)))
        lower = NUM_BINS - 1 - position
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


def _gather(plan: Plan, settings: SelectSettings, low: int, high: int) -> npt.NDArray[Any]:
    """Eligible rows with low <= key < high."""
    jobs = [_gather_task.remote(u, first, settings, low, high) for first, u in tasks(plan)]
    return np.concatenate(ray.get(jobs))


@ray.remote
def _gather_task(
    urls: list[str], first_unit: int, settings: SelectSettings, low: int, high: int
) -> npt.NDArray[Any]:
    found = []
    for unit, part in enumerate(read_parts(urls, settings), start=first_unit):
        part = part.filter(eligible_rows(part, settings)[0])
        keys = to_keys(part[settings.by].to_numpy())
        inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))
        kept = part.filter(pa.array(inside))
        rows = np.empty(len(kept), _CANDIDATE)
        rows["key"] = keys[inside]
        rows["sample_id"] = ids_of(kept["sample_id"])
        rows["unit"] = unit
        rows["row"] = kept["row_index"].to_numpy()
        found.append(rows)
    return np.concatenate(found)
