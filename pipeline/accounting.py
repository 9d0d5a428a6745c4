"""Accounting: count rows by status from the parts themselves, at the end of every run."""

from collections import Counter

import ray

from pipeline import storage
from pipeline.errors import AccountingError
from pipeline.units import Plan, Unit

_PARTS_PER_TASK = 64


def tally(plan: Plan, units: list[Unit]) -> Counter[str]:
    """Count rows by status from the parts themselves, and check that none is lost or doubled.

    Raises:
        AccountingError: A part does not hold exactly its unit's rows.
    """
    jobs = [
        [(plan.part_url(unit), unit.start, unit.stop) for unit in units[i : i + _PARTS_PER_TASK]]
        for i in range(0, len(units), _PARTS_PER_TASK)
    ]
    total: Counter[str] = Counter()
    for counts in ray.get([_tally_parts.remote(job) for job in jobs]):
        total.update(counts)
    expected = sum(unit.num_rows for unit in units)
    if sum(total.values()) != expected:
        raise AccountingError(
            f"{plan.scores_url}: parts hold {sum(total.values())} rows, the input {expected}."
        )
    return total


@ray.remote
def _tally_parts(parts: list[tuple[str, int, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for url, start, stop in parts:
        with storage.open_parquet(url) as parquet:
            table = parquet.read(columns=["row_index", "status"])
        if table["row_index"].to_pylist() != list(range(start, stop)):
            raise AccountingError(
                f"part {url}: got {len(table)} rows, expected rows {start} to {stop - 1} of its "
                "shard, each once. Delete the part and run again."
            )
        total.update(table["status"].to_pylist())
    return total
