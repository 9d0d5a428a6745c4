"""What large row groups cost: units of one row group read alone, and together as a run reads them.

A row group has to be read from its start, so that units read alone decode it again and again. Both
ways in turns, in one process; prints the time of each and the ratio.

    python tests/benchmarks/reading.py [--rows N] [--unit-rows N] [--rounds N]
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import InputConfig
from pipeline.inputs import open_corpus
from pipeline.rows import plan_reads, read_units
from pipeline.units import Unit, make_plan

READS = 8
"""Of a run with one actor, at least (scoring.py)."""

WORDS = [f"word{number}" for number in range(5000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--unit-rows", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/shard.parquet"
        pq.write_table(table_of(options.rows), path, row_group_size=options.rows)
        corpus = open_corpus(InputConfig(path=path), f"{folder}/out")
        units = make_plan(corpus, f"{folder}/out", "fp", options.unit_rows, 0, None).units
        ways = {"alone": [[unit] for unit in units], "together": plan_reads(units, READS)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name, reads in ways.items():
                seconds[name].append(time_of(reads, options.rows))
                print(f"round {number}: {name}: {seconds[name][-1]:.2f} s, {len(reads)} reads")
    ratios = [a / b for a, b in zip(seconds["alone"], seconds["together"], strict=True)]
    result = {
        "rows": options.rows,
        "units": len(units),
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }
    print(json.dumps(result))


def table_of(rows: int) -> pa.Table:
    """Rows of about Alpaca's lengths."""
    rng = random.Random(0)

    def texts(words: int) -> list[str]:
        return [" ".join(rng.choices(WORDS, k=words)) for _ in range(rows)]

    return pa.table({"instruction": texts(10), "output": texts(40)})


def time_of(reads: Iterable[Sequence[Unit]], rows: int) -> float:
    """Seconds in which all units are read."""
    begun = time.perf_counter()
    found = sum(len(table) for read in reads for table in read_units(read))
    assert found == rows
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
