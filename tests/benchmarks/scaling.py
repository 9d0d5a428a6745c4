"""How scoring scales with its actors: the whole job, with a scorer that only sleeps.

Units of about five seconds, on logical GPUs, one an actor. The scorer costs a fixed time per token
and imports no torch, so that what is measured is this pipeline and Ray, and not the cores that
this machine lacks. Linear would be the scorers' own seconds over the number of actors: all of them
busy from the first scoring start to the last commit. The time of a unit outside scoring is what its
actor was idle for, per unit, its start and the end of the run included.

    python tests/benchmarks/scaling.py [--actors 1 2 4 8] [--units N]
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from conftest import make_model_dir  # noqa: E402
from sleeping import SCORERS, SECONDS_PER_TOKEN, SleepingScorer  # noqa: E402

from pipeline import config, run, scoring  # noqa: E402

ROWS_PER_UNIT = 20


def main() -> None:
    options = parse_options()
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    scoring.UnitScorer = SleepingScorer  # type: ignore[misc]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model_dir(folder / "model")
        write_corpus(folder / "corpus.parquet", options.units)
        for actors in options.actors:
            results.append(measure(actors, options, folder, model))
            print(describe(results[-1]), flush=True)
    print(json.dumps(results))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--units", type=int, default=160)
    parser.add_argument("--seconds-per-token", type=float, default=0.0022)
    return parser.parse_args()


def write_corpus(path: Path, units: int) -> None:
    """Rows of one length, so that every unit costs the same."""
    rows = [
        {"instruction": f"{n} one", "input": "", "output": "two three " * 40}
        for n in range(units * ROWS_PER_UNIT)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_PER_UNIT)


def measure(actors: int, options: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    scorers = folder / f"scorers-{actors}"
    scorers.mkdir()
    settings = config.parse(
        {
            "input": {"path": str(folder / "corpus.parquet")},
            "output": str(folder / f"out-{actors}"),
            "model": {"path": str(model), "dtype": "float32"},
            "score": {"unit_rows": ROWS_PER_UNIT},
            "cluster": {"actors": actors, "gpus_per_actor": 1},
        }
    )
    variables = {
        SECONDS_PER_TOKEN: str(options.seconds_per_token),
        SCORERS: str(scorers),
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
    }
    ray.init(
        address="local", num_cpus=4, num_gpus=actors, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, runtime_env={"env_vars": variables},
    )  # fmt: skip
    try:
        begun = time.monotonic()
        summary = run.score(settings).summary
        whole = time.monotonic() - begun
    finally:
        ray.shutdown()
    asleep = [float(path.read_text()) for path in scorers.iterdir()]
    assert len(asleep) == actors, f"{len(asleep)} of {actors} actors scored"
    assert summary.tokens_per_s is not None
    seconds = summary.tokens_scored / summary.tokens_per_s
    return {
        "actors": actors,
        "units": options.units,
        "unit_s": sum(asleep) / options.units,
        "scoring_s": seconds,
        "whole_s": whole,
        "of_linear": sum(asleep) / actors / seconds,
        "outside_ms_per_unit": 1000 * (seconds * actors - sum(asleep)) / options.units,
    }


def describe(found: dict[str, Any]) -> str:
    return (
        f"{found['actors']} actors: {found['units']} units of {found['unit_s']:.2f} s in "
        f"{found['scoring_s']:.1f} s ({found['whole_s']:.1f} s with start and selection), "
        f"{found['of_linear']:.3f} of linear, "
        f"{found['outside_ms_per_unit']:.0f} ms a unit outside scoring"
    )


if __name__ == "__main__":
    main()
