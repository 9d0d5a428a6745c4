"""Trials of the fault tests: a run, what is killed of it and when, and what it leaves behind."""

import io
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from conftest import S3
from faults_cluster import Driver, Machines, wait_until


@dataclass(frozen=True)
class Kill:
    """What to kill, drawn before the trial begins."""

    what: Literal["driver", "actor", "node"]
    moment: float
    """Share of the time that the run would still take."""
    pick: float
    """Which of several: 0 the first, towards 1 the last."""


@dataclass(frozen=True)
class Strike:
    """A kill that was carried out."""

    what: str
    after_s: float
    """Since the trial began."""
    victim: str
    time: float
    """Unix time from which on no work of before the kill goes on."""
    committed: frozenset[str]
    """Units with a part: at the kill; with the driver's, when all its tasks were gone."""

    def describe(self) -> str:
        return f"{self.what} at {self.after_s:.1f} s ({len(self.committed)} parts)"


@dataclass
class Trial:
    """What happened in one trial, as its line in the log tells it."""

    number: int
    seed: int
    strikes: list[Strike] = field(default_factory=list)
    missed: int = 0
    """Kills for which the run ended too soon."""
    reruns: int = 0
    seconds: float = 0.0
    in_flight: list[int] = field(default_factory=list)
    """Per kill: units that had been started and had no part."""
    repeated: int = 0
    """Units that were started again, counted each time."""
    failures: list[str] = field(default_factory=list)

    def describe(self) -> str:
        strikes = ", ".join(strike.describe() for strike in self.strikes)
        verdict = "; ".join(self.failures).splitlines()[0] if self.failures else "identical"
        return (
            f"trial {self.number} (seed {self.seed}): {strikes}; {self.reruns} reruns, "
            f"{self.repeated} units twice of {sum(self.in_flight)} in flight, "
            f"{self.seconds:.0f} s: {verdict}"
        )

    def to_json(self) -> str:
        strikes = [{**asdict(s), "committed": len(s.committed)} for s in self.strikes]
        return json.dumps({**asdict(self), "strikes": strikes})


@dataclass(frozen=True)
class Job:
    """The corpus in the bucket, the cluster, and where runs write."""

    s3: S3
    endpoint: str
    """Of the slow way to it, which the runs take."""
    machines: Machines
    config: Path
    folder: Path

    def driver(self, name: str, attempt: int) -> Driver:
        folder = self.folder / name / f"attempt-{attempt}"
        trace, address = self.trace(name), self.machines.address
        return Driver(self.config, self.output(name), folder, trace, address, self.endpoint)

    def output(self, name: str) -> str:
        return self.s3.url("faults", name)

    def trace(self, name: str) -> Path:
        return self.folder / name / "trace"

    def parts(self, name: str) -> frozenset[str]:
        """Ids of the units that have a part."""
        fs = self.s3.filesystem()
        fs.invalidate_cache()
        found = fs.find(f"{self.output(name)}/scores")
        return frozenset(Path(key).stem for key in found)

    def objects(self, name: str) -> dict[str, bytes]:
        """Scores, cherry subset and the pointer to it; not the config, which names the output."""
        fs = self.s3.filesystem()
        root = self.output(name).removeprefix("s3://")
        found = fs.cat(fs.find(root))
        names = {key.removeprefix(f"{root}/"): data for key, data in found.items()}
        return {k: v for k, v in names.items() if k.startswith(("scores/", "cherry/", "LATEST"))}


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    summary: dict[str, Any]
    objects: dict[str, bytes]
    rows: list[tuple[str, int]]
    seconds: float
    startup_s: float
    """Until the first unit began to be scored."""

    def seconds_left(self, committed: int, starting: bool) -> float:
        """How long a run would still take, undisturbed."""
        units: int = self.summary["units_total"]
        scoring = (self.seconds - self.startup_s) * (1 - committed / units)
        return scoring + self.startup_s * starting


def draw_kills(rng: random.Random) -> list[Kill]:
    whats: tuple[Literal["driver", "actor", "node"], ...] = ("driver", "actor", "node")
    return [
        Kill(rng.choice(whats), rng.uniform(0.0, 0.95), rng.random())
        for _ in range(rng.randint(1, 3))
    ]


def play(
    kills: list[Kill], name: str, trial: Trial, job: Job, reference: Reference
) -> dict[str, Any]:
    """Run, kill and run again; the last attempt's summary, with the parts that it found."""
    job.machines.restore()
    job.machines.await_rest()
    begun = time.monotonic()
    driver, attempt, found = job.driver(name, 0), 0, frozenset[str]()
    starting = True
    try:
        for kill in kills:
            left = reference.seconds_left(len(job.parts(name)), starting)
            if driver.ends_within(kill.moment * left):
                trial.missed += 1
                continue
            starting = False
            strike = carry_out(kill, name, driver, job, begun)
            if strike is None:
                trial.missed += 1
                continue
            trial.strikes.append(strike)
            if kill.what == "driver":
                attempt, found, starting = attempt + 1, strike.committed, True
                driver = job.driver(name, attempt)
        ends = driver.ends_within(300 + 4 * reference.seconds)
        assert ends, f"the run does not end: {driver.last_words()}"
        trial.reruns += attempt
        return {**driver.summary(), "found": found}
    finally:
        driver.kill()
        trial.seconds += time.monotonic() - begun


def carry_out(kill: Kill, name: str, driver: Driver, job: Job, begun: float) -> Strike | None:
    """Kill it; None if the run has ended before there was anything to kill."""
    machines = job.machines
    if kill.what == "actor":
        wait_until(lambda: driver.ended or machines.scores(), "there is a scoring actor")
    if driver.ended:
        return None
    committed, after_s = job.parts(name), time.monotonic() - begun
    if kill.what == "driver":
        driver.kill()
        machines.await_rest()
        return Strike("driver", after_s, "", time.time(), job.parts(name))
    victim = (machines.kill_scorer if kill.what == "actor" else machines.kill_node)(kill.pick)
    struck = time.time()
    machines.restore()
    return Strike(kill.what, after_s, victim, struck, committed) if victim else None


def read_starts(trace: Path) -> list[tuple[str, float]]:
    """Unit and Unix time of every time that scoring a unit began, as the workers noted it.

    A unit that is scored in pieces begins with the piece of its first row.
    """
    lines = trace.read_text().splitlines() if trace.exists() else []
    noted = [(unit, int(row), float(when)) for unit, row, when, _ in map(str.split, lines)]
    first: dict[str, int] = {}
    for unit, row, _ in noted:
        first[unit] = min(row, first.get(unit, row))
    return [(unit, when) for unit, row, when in noted if row == first[unit]]


_WORDS = "one two three the capital of France is Paris, a poem about the sea and wind: -".split()


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Alpaca rows of all lengths; every 97th without a response."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(least, most)))

    return [
        {
            "instruction": f"Row {number}: {text(3, 15)}",
            "input": text(1, 10) if number % 3 == 0 else "",
            "output": text(10, 120) if number % 97 else "",
        }
        for number in range(count)
    ]


def row_keys(objects: dict[str, bytes]) -> list[tuple[str, int]]:
    """(shard, row_index) of every row of the parts, sorted: each is to be there once."""
    keys: list[tuple[str, int]] = []
    for name, data in objects.items():
        if name.startswith("scores/"):
            table = pq.read_table(io.BytesIO(data))
            shard = json.loads(table.schema.metadata[b"cherry.unit"])["shard_url"]
            keys += [(shard, index) for index in table["row_index"].to_pylist()]
    return sorted(keys)
