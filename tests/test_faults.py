"""Killed runs, run again, end with the bytes of an undisturbed one.

Each trial kills a run one to three times: the driver's process group, a scoring actor or a whole
node, at moments drawn from a printed seed. Actors and nodes the run itself must survive; a killed
driver is started again. ``make test`` makes two trials over a short run, ``make test-faults`` fifty
over one of a minute or more, with a line each in ``build/faults.jsonl``. Every request of a run
goes through a proxy that makes it wait, as a store that is far away does: a kill then meets reads
and writes under way, and not only the model. One trial again:

    CHERRY_FAULT_RUNS=50 CHERRY_FAULT_SEED=7 pytest tests/test_faults.py -s -k '[12]'
"""

import io
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import REPOSITORY, S3
from fault_proxy import FaultProxy
from faults import Job, Reference, Strike, Trial, draw_kills, make_rows, play, read_starts, row_keys
from faults_cluster import machines, wait_until

LONG = "CHERRY_FAULT_RUNS" in os.environ
RUNS = int(os.environ.get("CHERRY_FAULT_RUNS", 2))
SEED = int(os.environ.get("CHERRY_FAULT_SEED", random.randrange(10**6) if LONG else 13))
ROWS = int(os.environ.get("CHERRY_FAULT_ROWS", 3_500 if LONG else 900))
DELAY_S = float(os.environ.get("CHERRY_FAULT_DELAY_S", 0.05 if LONG else 0.02))
LEAST_S = 60  # of an undisturbed long run
UNITS = 48 if LONG else 36
SHARDS = 6
LOG = REPOSITORY / "build/faults.jsonl"

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


@pytest.fixture(scope="module")
def job(s3_server: S3, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("faults")
    rows = make_rows(ROWS, seed=0)
    fs = s3_server.filesystem()
    for number in range(SHARDS):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[number::SHARDS]), sink)
        fs.pipe_file(s3_server.url("faults-corpus", f"shard-{number}.parquet"), sink.getvalue())
    config = folder / "job.yaml"
    raw = {
        "input": {"path": s3_server.url("faults-corpus")},
        "output": s3_server.url("faults"),
        "model": {"path": str(model_dir), "dtype": "float32"},
        "score": {"unit_rows": max(1, ROWS // UNITS)},
        "select": {"fraction": 0.25},
        "cluster": {"actors": 2, "threads_per_actor": 1},
    }
    config.write_text(yaml.safe_dump(raw))
    with FaultProxy(s3_server.endpoint) as proxy, machines(num_workers=2) as cluster:
        proxy.delay_s = DELAY_S
        yield Job(s3_server, proxy.endpoint, cluster, config, folder)


@pytest.fixture(scope="module")
def reference(job: Job) -> Reference:
    begun, begun_unix = time.monotonic(), time.time()
    driver = job.driver("reference", 0)
    assert driver.ends_within(900), "the undisturbed run did not end"
    seconds = time.monotonic() - begun
    summary = driver.summary()
    starts = read_starts(job.trace("reference"))
    assert len(starts) == summary["units_total"], "the trace does not tell which units were scored"
    startup_s = min(when for _, when in starts) - begun_unix
    objects = job.objects("reference")
    rows = row_keys(objects)
    units = summary["units_total"]
    say(
        f"undisturbed: {ROWS} rows in {units} units, {seconds:.1f} s, of which {startup_s:.1f} s "
        f"before the first unit; seed {SEED}"
    )
    assert len(set(rows)) == len(rows) == summary["rows"] == ROWS
    return Reference(summary, objects, rows, seconds, startup_s)


@pytest.fixture(scope="module")
def trials() -> Iterator[list[Trial]]:
    """Every trial made; the table of them in the end."""
    made: list[Trial] = []
    yield made
    strikes = Counter(strike.what for trial in made for strike in trial.strikes)
    failed = [trial.number for trial in made if trial.failures]
    say(
        f"{len(made) - len(failed)} of {len(made)} identical (seed {SEED})\n"
        f"kills       {dict(strikes)}, {sum(t.missed for t in made)} came too late\n"
        f"reruns      {sum(t.reruns for t in made)}\n"
        f"in flight   {sum(sum(t.in_flight) for t in made)}, "
        f"at most {max((max(t.in_flight, default=0) for t in made), default=0)} at one kill\n"
        f"done twice  {sum(t.repeated for t in made)} units\n"
        f"seconds     {sum(t.seconds for t in made):.0f}\n"
        f"failed      {failed}"
    )


@pytest.mark.skipif(not LONG, reason="a few runs need not be long ones")
def test_an_undisturbed_long_run_takes_a_minute(reference: Reference) -> None:
    assert reference.seconds >= LEAST_S, "set more CHERRY_FAULT_ROWS"


@pytest.mark.parametrize("number", range(RUNS))
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    number: int, job: Job, reference: Reference, trials: list[Trial]
) -> None:
    rng = random.Random(f"{SEED}/{number}")
    trial = Trial(number, SEED)
    trials.append(trial)
    try:
        for again in range(5):  # a run that ends before its first kill proves nothing
            name = f"trial-{number}-{again}"
            summary = play(draw_kills(rng), name, trial, job, reference)
            check(name, summary, trial, job, reference)
            if trial.strikes:
                break
        else:
            trial.failures.append("five runs ended before their first kill")
    except BaseException as err:
        trial.failures.append(f"{type(err).__name__}: {err}")
        raise
    finally:
        if LONG:
            LOG.parent.mkdir(exist_ok=True)
            with open(LOG, "a") as log:
                log.write(trial.to_json() + "\n")
        say(trial.describe())
    assert trial.failures == []


def test_a_node_that_is_lost_for_good_costs_only_its_units(job: Job, reference: Reference) -> None:
    """Nobody replaces it: its actor must not take the last core of the node that is left."""
    trial = Trial(-1, SEED)
    name = "lost-for-good"
    job.machines.restore()
    job.machines.await_rest()
    driver = job.driver(name, 0)
    try:
        wait_until(lambda: driver.ended or len(job.parts(name)) >= 3, "three parts are there", 300)
        committed = job.parts(name)
        victim = job.machines.kill_node(0.0)
        trial.strikes.append(Strike("node", 0.0, victim, time.time(), committed))
        ends = driver.ends_within(300 + 4 * reference.seconds)
        assert ends, f"the run does not end: {driver.last_words()}"
        summary = {**driver.summary(), "found": frozenset()}
    finally:
        driver.kill()
        job.machines.restore()
    check(name, summary, trial, job, reference)
    assert trial.failures == []


def check(name: str, summary: dict[str, Any], trial: Trial, job: Job, reference: Reference) -> None:
    """Compare with the undisturbed run, and count what was done twice."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            trial.failures.append(what)

    objects, expected = job.objects(name), reference.objects
    require(objects.keys() == expected.keys(), "other objects than undisturbed: "
            f"{sorted(objects.keys() ^ expected.keys())}")  # fmt: skip
    differ = [key for key in expected if objects.get(key, expected[key]) != expected[key]]
    require(not differ, f"other bytes than undisturbed: {differ}")
    require(row_keys(objects) == reference.rows, "a row is lost or doubled")
    for key in ("rows", "rows_by_status", "units_total", "selected_rows", "cut"):
        got, wanted = summary[key], reference.summary[key]
        require(got == wanted, f"summary {key}: {got}, undisturbed {wanted}")
    fresh = summary["units_total"] - len(summary["found"])
    got = summary["units_scored"]
    require(got == fresh, f"the last attempt scored {got} units; {fresh} had no part")

    # In flight at a kill: started and without a part. Nothing else may be started again, and
    # nothing once more than there were kills that it was in flight at.
    starts = read_starts(job.trace(name))
    may_repeat: Counter[str] = Counter()
    for strike in trial.strikes:
        begun = {unit for unit, when in starts if when <= strike.time}
        may_repeat.update(begun - strike.committed)
        trial.in_flight.append(len(begun - strike.committed))
    repeats = Counter({unit: n - 1 for unit, n in Counter(unit for unit, _ in starts).items()})
    trial.repeated += sum(repeats.values())
    needless = {unit: n - may_repeat[unit] for unit, n in repeats.items() if n > may_repeat[unit]}
    require(not needless, f"scored again though not in flight at a kill: {needless}")
