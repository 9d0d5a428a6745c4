"""Accounting: rows by status from the parts themselves, checked at the end of every run.

A part is read whole, once: its rows must be exactly its unit's, and its bytes get a hash. The
ledger, ``<output>/ledger/<score_fp>.parquet``, remembers what was found under the object's version
(its ETag), so that a rerun pays one listing for parts that nobody has touched. The ledger is only a
memory: without it, or with a part of another version, the part is read again.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipeline import listing, memories, storage
from pipeline.errors import AccountingError, StorageError
from pipeline.schemas import FAILED_STATUSES, LEDGER, STATUSES
from pipeline.texts import count
from pipeline.units import Plan, Unit

_PARTS_PER_TASK = 64
_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """What was found in one part."""

    version: str
    sha256: str
    rows_by_status: dict[str, int]


@dataclass(frozen=True)
class Audit:
    """What the parts of a plan hold."""

    entries: dict[str, Entry]
    """By unit_id, in the order of the plan."""

    @property
    def rows_by_status(self) -> Counter[str]:
        """Over all parts."""
        total: Counter[str] = Counter()
        for entry in self.entries.values():
            total.update(entry.rows_by_status)
        return total

    @property
    def digest(self) -> str:
        """Of the bytes of all parts, in order."""
        hashes = "\n".join(entry.sha256 for entry in self.entries.values())
        return hashlib.sha256(hashes.encode()).hexdigest()

    def with_errors(self) -> set[str]:
        """Units that hold rows with status `error`."""
        return {i for i, entry in self.entries.items() if entry.rows_by_status.get("error")}

    def refuse_changed(self, plan: Plan) -> None:
        """Look whether the parts are still the objects that were audited.

        Raises:
            StorageError: One is another, or gone.
        """
        names = listing.list_names(plan.scores_url)
        changed = [i for i, e in self.entries.items() if names.get(f"{i}.parquet") != e.version]
        if changed:
            raise StorageError(
                f"{plan.scores_url}: {count(len(changed), 'part')} changed after they were read, "
                f"the first is {changed[0]}.parquet. Another run rescores or deletes them: let it "
                "end, and run this command again."
            )


def audit(plan: Plan) -> Audit:
    """Count rows by status, and check that none is lost or doubled, per shard and in all.

    Raises:
        AccountingError: A part is missing, unreadable, or does not hold exactly its unit's rows.
    """
    names = listing.list_names(plan.scores_url)
    known = _read_ledger(plan)
    entries: dict[str, Entry] = {}
    fresh: list[tuple[Unit, str]] = []
    for unit in plan.units:
        version = names.get(f"{unit.unit_id}.parquet")
        if version is None:
            raise AccountingError(f"part {plan.part_url(unit)}: it is missing. Run again.")
        entry = known.get(unit.unit_id)
        if entry is None or entry.version != version:
            fresh.append((unit, version))
        else:
            entries[unit.unit_id] = entry
    jobs = [
        _read_parts.remote(fresh[i : i + _PARTS_PER_TASK], plan.scores_url)
        for i in range(0, len(fresh), _PARTS_PER_TASK)
    ]
    for found in ray.get(jobs):
        entries |= found
    if fresh:
        there = {name.removesuffix(".parquet") for name in names}
        _write_ledger(plan, {i: e for i, e in (known | entries).items() if i in there})
    audited = Audit({unit.unit_id: entries[unit.unit_id] for unit in plan.units})
    _check_shards(plan, audited)
    return audited


def first_failures(plan: Plan, audited: Audit) -> list[str]:
    """The first few rows that failed, and why: `shard a.parquet, row 6: malformed: utf8`."""
    found: list[str] = []
    for unit in plan.units:
        if len(found) >= _FAILURES_SHOWN:
            break
        counts = audited.entries[unit.unit_id].rows_by_status
        if not any(counts.get(status) for status in FAILED_STATUSES):
            continue
        with storage.open_parquet(plan.part_url(unit)) as parquet:
            for row in parquet.read(["row_index", "status", "reason"]).to_pylist():
                if row["status"] in FAILED_STATUSES:
                    why = f": {row['reason']}" if row["reason"] else ""
                    where = f"shard {unit.shard_url}, row {row['row_index']}"
                    found.append(f"{where}: {row['status']}{why}")
    return found[:_FAILURES_SHOWN]


def _check_shards(plan: Plan, audited: Audit) -> None:
    rows: Counter[str] = Counter()
    for unit in plan.units:
        rows[unit.shard_url] += sum(audited.entries[unit.unit_id].rows_by_status.values())
    for shard, expected in plan.rows_by_shard.items():
        if rows[shard] != expected:
            raise AccountingError(
                f"{plan.scores_url}: the parts of shard {shard} hold {rows[shard]} rows, expected "
                f"{expected}, as its footer says."
            )


@ray.remote
def _read_parts(parts: list[tuple[Unit, str]], scores_url: str) -> dict[str, Entry]:
    """Each unit comes with the version of its part."""
    contents = storage.read_many(unit.part_url(scores_url) for unit, _ in parts)
    return {
        unit.unit_id: Entry(
            version, hashlib.sha256(data).hexdigest(), _count(data, unit, scores_url)
        )
        for data, (unit, version) in zip(contents, parts, strict=True)
    }


def _count(data: bytes, unit: Unit, scores_url: str) -> dict[str, int]:
    """Rows by status of a part that is exactly its unit's."""
    url = unit.part_url(scores_url)
    try:
        # All of it: every page has a checksum, which nobody else looks at.
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        its = json.loads((table.schema.metadata or {}).get(b"cherry.unit", "{}"))
    except (pa.ArrowException, OSError, ValueError) as err:
        raise AccountingError(
            f"part {url}: not readable as Parquet: {err}. Delete the part and run again."
        ) from None
    if its and its.get("unit_id") != unit.unit_id:
        raise AccountingError(
            f"part {url}: got the part of unit {its.get('unit_id')}, of shard "
            f"{its.get('shard_url')}, expected that of unit {unit.unit_id}. Delete it, and run "
            "again."
        )
    if not np.array_equal(table["row_index"].to_numpy(), np.arange(unit.start, unit.stop)):
        raise AccountingError(
            f"part {url}: got {len(table)} rows, expected rows {unit.start} to {unit.stop - 1} of "
            "its shard, each once. Delete the part and run again."
        )
    counts = {v["values"]: v["counts"] for v in pc.value_counts(table["status"]).to_pylist()}
    return dict(sorted(counts.items()))


def _ledger_url(plan: Plan) -> str:
    scores, _, score_fp = plan.scores_url.rpartition("/")
    return storage.join(scores.rpartition("/")[0], "ledger", f"{score_fp}.parquet")


def _read_ledger(plan: Plan) -> dict[str, Entry]:
    return {
        row["unit_id"]: Entry(
            row["version"], row["sha256"], {s: row[s] for s in sorted(STATUSES) if row[s]}
        )
        for row in memories.recall(_ledger_url(plan), LEDGER)
    }


def _write_ledger(plan: Plan, entries: dict[str, Entry]) -> None:
    rows = [
        {"unit_id": i, "version": e.version, "sha256": e.sha256}
        | {status: e.rows_by_status.get(status, 0) for status in STATUSES}
        for i, e in sorted(entries.items())
    ]
    memories.remember(_ledger_url(plan), rows, LEDGER)
