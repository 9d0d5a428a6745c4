"""The global cut against Ray Data's sort and limit, and against merely reading.

    python tests/benchmarks/selection.py scores             # 20 million scores, no text
    python tests/benchmarks/selection.py text               # 1 million rows of about 1 KB
    python tests/benchmarks/selection.py curve --rows 1e6 5e6 20e6 100e6

All take part in one run, in turns, over the same files and on the same number of CPUs, each in a
fresh local Ray. Memory is the proportional set size (PSS) of the driver and all processes of that
Ray together, so that shared memory counts once, sampled every 100 ms: the peak, and what it was
when Ray had started and nothing ran. None is a test.

    floor      the tasks of a selection, which only read status, score and sample id of every part
    cherry     survey and rank (`scores`), or the whole selection with its subset (`text`)
    ray.data   read_parquet, filter, sort descending, limit to the same number of rows, write
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline import accounting, selection
from pipeline.budgets import SelectSettings, asked_rows
from pipeline.config import InputConfig
from pipeline.config_select import SelectConfig
from pipeline.inputs import Corpus, open_corpus
from pipeline.layouts import Columns
from pipeline.parts import to_parquet
from pipeline.ranking import rank
from pipeline.schemas import PART
from pipeline.scores import Task, read_columns, tasks
from pipeline.survey import survey_parts
from pipeline.units import Plan, Unit, make_plan

_ROWS_PER_PART = 10_000
_CPUS = 2
_EVERY_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    commands = parser.add_subparsers(required=True)
    for name, command, rows in (
        ("scores", against_ray, [20e6]),
        ("text", against_ray_with_text, [1e6]),
        ("curve", curve, [1e6, 5e6, 20e6, 100e6]),
    ):
        sub = commands.add_parser(name)
        sub.add_argument("--rows", type=float, nargs="+", default=rows)
        sub.add_argument("--rounds", type=int, default=3)
        sub.add_argument("--store-gib", type=float, default=2.0, help="Ray's object store")
        sub.set_defaults(command=command)
    arguments = vars(parser.parse_args())
    target = arguments.pop("json")
    figures = arguments.pop("command")(**arguments)
    if target:
        target.write_text(json.dumps(figures, indent=1))


# What is measured


def against_ray(rows: list[float], rounds: int, store_gib: float) -> dict[str, Any]:
    """Score rows alone: time and memory of a cut at a tenth."""
    with scored(int(rows[0])) as plan:
        keep = len(plan.units) * _ROWS_PER_PART // 10
        ways = {
            "floor": lambda: floor(plan),
            "cherry, copies kept": lambda: cut(plan, "keep"),
            "cherry, copies dropped": lambda: cut(plan, "drop"),
            "ray.data": lambda: sort_and_limit(Path(plan.scores_url), keep, None),
        }
        return in_turns(ways, rounds, store_gib, int(rows[0]))


def against_ray_with_text(rows: list[float], rounds: int, store_gib: float) -> dict[str, Any]:
    """Rows with their text: the whole selection, to Parquet on disk."""
    with tempfile.TemporaryDirectory() as folder:
        plan, corpus = corpus_with_text(Path(folder), int(rows[0]))
        joined = join_scores(Path(folder), plan)
        count = iter(range(10**6))

        def ours(duplicates: str) -> int:
            settings = settings_of(duplicates)
            output = f"{folder}/out-{next(count)}"
            audited = accounting.audit(plan)
            found, _ = selection.select(plan, corpus, output, settings, audited)
            shutil.rmtree(output)
            return int(found.manifest["selected_rows"])

        def theirs() -> int:
            output = Path(folder, f"ray-{next(count)}")
            kept = sort_and_limit(joined, int(rows[0]) // 10, output)
            shutil.rmtree(output)
            return kept

        ways = {
            "cherry, copies kept": lambda: ours("keep"),
            "cherry, copies dropped": lambda: ours("drop"),
            "ray.data": theirs,
        }
        return in_turns(ways, rounds, store_gib, int(rows[0]))


def curve(rows: list[float], rounds: int, store_gib: float) -> dict[str, Any]:
    """Time and memory of a cut at a tenth over growing corpora."""
    figures = {}
    for size in map(int, rows):
        with scored(size) as plan:
            ways = {
                "floor": lambda plan=plan: floor(plan),
                "cherry, copies kept": lambda plan=plan: cut(plan, "keep"),
                "cherry, copies dropped": lambda plan=plan: cut(plan, "drop"),
            }
            some = 1 if size > 50_000_000 else rounds
            figures[f"{size:,}"] = in_turns(ways, some, store_gib, size)
    return figures


def cut(plan: Plan, duplicates: str) -> int:
    """Survey and rank, as `cherry select` does; the rows stay in the object store."""
    settings = settings_of(duplicates)
    survey, kept = survey_parts(plan, settings)
    asked = asked_rows(settings, survey.groups, survey.rows, survey.eligible)
    return int(rank(plan, settings, survey, kept, asked).selected[-1].sum())


def floor(plan: Plan) -> int:
    """The same tasks, which read and nothing else."""
    return sum(ray.get([_read.remote(task) for task in tasks(plan)]))


@ray.remote
def _read(task: Task) -> int:
    return len(read_columns(task, ["status", "ifd_loss_ratio", "sample_id"]))


def sort_and_limit(source: Path, keep: int, output: Path | None) -> int:
    """What one would write with Ray Data alone."""
    data = ray.data.read_parquet(str(source))
    if output is None:
        data = data.select_columns(["status", "ifd_loss_ratio", "sample_id"])
    data = data.map_batches(_eligible, batch_format="pyarrow", batch_size=None)
    data = data.sort("ifd_loss_ratio", descending=True).limit(keep)
    if output is None:
        return int(data.materialize().count())
    data.write_parquet(str(output))
    return keep


def _eligible(batch: pa.Table) -> pa.Table:
    ratio = batch["ifd_loss_ratio"].to_numpy()
    ok = np.asarray(batch["status"].cast(pa.string())) == "ok"
    return batch.filter(pa.array(ok & (ratio < 1.0)))


def settings_of(duplicates: str) -> SelectSettings:
    config = SelectConfig.model_validate({"fraction": "0.1", "duplicates": duplicates})
    return SelectSettings.from_config(config, "ifd_loss_ratio")


# Corpora


@contextmanager
def scored(num_rows: int) -> Iterator[Plan]:
    """Parts of a corpus that has no text."""
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        units = []
        for number in range(num_rows // _ROWS_PER_PART):
            start = number * _ROWS_PER_PART
            units.append(
                Unit(
                    unit_id=f"{number:032x}",
                    shard_url="shard",
                    read_url="shard",
                    columns=Columns("alpaca", {}),
                    start=start,
                    stop=start + _ROWS_PER_PART,
                    score_fp="fp",
                    input_fp="fp",
                )
            )
            Path(units[-1].part_url(folder)).write_bytes(a_part(random, units[-1]))
        print(f"{num_rows:,} rows in {len(units):,} parts", flush=True)
        yield Plan(tuple(units), folder, {"shard": num_rows})


def corpus_with_text(folder: Path, num_rows: int) -> tuple[Plan, Corpus]:
    """Alpaca shards of 50,000 rows of about 1 KB, and their parts."""
    random = np.random.default_rng(0)
    words = np.array([f"w{n:x}" for n in range(5_000)])
    (folder / "corpus").mkdir()
    for number in range(-(-num_rows // 50_000)):
        texts = [" ".join(random.choice(words, 200)) for _ in range(500)]
        picks = random.integers(0, 500, (2, 50_000))
        table = pa.table(
            {
                "instruction": [f"{number} {n} {texts[i][:200]}" for n, i in enumerate(picks[0])],
                "output": [f"{n} {texts[i][:800]}" for n, i in enumerate(picks[1])],
            }
        )
        pq.write_table(table, folder / f"corpus/{number:04d}.parquet", row_group_size=10_000)
    corpus = open_corpus(InputConfig(path=str(folder / "corpus")), str(folder / "out"))
    plan = make_plan(corpus, str(folder / "out"), "fp", _ROWS_PER_PART, 1, None)
    Path(plan.scores_url).mkdir(parents=True)
    for unit in plan.units:
        Path(plan.part_url(unit)).write_bytes(a_part(random, unit))
    return plan, corpus


def join_scores(folder: Path, plan: Plan) -> Path:
    """The text with its scores beside it, as Ray Data would be given it: one file per shard."""
    target = folder / "joined"
    target.mkdir()
    for shard in sorted({unit.shard_url for unit in plan.units}):
        parts = [pq.read_table(plan.part_url(u)) for u in plan.units if u.shard_url == shard]
        scores = pa.concat_tables(parts).unify_dictionaries()
        table = pq.read_table(shard)
        for name in ("status", "ifd_loss_ratio", "sample_id"):
            table = table.append_column(name, scores[name])
        pq.write_table(table, target / Path(shard).name, row_group_size=10_000)
    return target


def a_part(random: np.random.Generator, unit: Unit) -> bytes:
    """Scores as they are: most between 0.3 and 1.1, one row in fifty without one."""
    size = unit.num_rows
    columns = {field.name: pa.nulls(size, field.type) for field in PART}
    ok = random.random(size) > 0.02
    kinds = pa.array((~ok).astype(np.int8))
    status = pa.DictionaryArray.from_arrays(kinds, ["ok", "empty_response"])
    ids = pa.py_buffer(random.bytes(16 * size))
    tokens = random.integers(1, 300, size)
    direct = random.gamma(8.0, 0.3, size) * tokens
    ratio = random.normal(0.72, 0.14, size)
    values: dict[str, Any] = {
        "row_index": np.arange(unit.start, unit.stop),
        "num_prompt_tokens": random.integers(10, 90, size),
        "num_response_tokens": tokens,
        "num_direct_tokens": tokens,
        "truncated": np.zeros(size, bool),
        "nll_conditioned": direct * ratio,
        "nll_direct": direct,
        "ifd_loss_ratio": ratio,
        "ifd_ppl_ratio": np.exp(direct / tokens * (ratio - 1)),
    }
    for name, array in values.items():
        missing = ~ok if PART.field(name).type == pa.float64() else None
        columns[name] = pa.array(array, PART.field(name).type, mask=missing)
    columns["status"] = status
    columns["sample_id"] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), size, [None, ids])
    turns = [columns[f.name] for f in PART.field("turns").type.value_type]
    columns["turns"] = pa.ListArray.from_arrays(
        pa.array(np.arange(size + 1), pa.int32()),
        pa.StructArray.from_arrays(turns, fields=list(PART.field("turns").type.value_type)),
    )
    return to_parquet(pa.table(columns, schema=PART))


# Measuring


def in_turns(
    ways: Mapping[str, Callable[[], int]], rounds: int, store_gib: float, num_rows: int
) -> dict[str, Any]:
    """Seconds and memory of each way, round after round; a table of medians."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            taken, peak, idle, kept = measure(way, store_gib)
            seconds[name].append(taken)
            memory[name].append(peak)
            print(
                f"  round {number + 1}  {name:24s} {taken:7.1f} s {peak:7.0f} MB, "
                f"{idle:.0f} MB before; {kept:,} rows",
                flush=True,
            )
    print(f"{num_rows:,} rows, {_CPUS} CPUs, median of {rounds} (least to most):")
    figures: dict[str, Any] = {}
    for name in ways:
        say = [f"{spread(seconds[name])} s", f"{statistics.median(memory[name]):5.0f} MB"]
        if "floor" in ways and name != "floor":
            times = [a / b for a, b in zip(seconds[name], seconds["floor"], strict=True)]
            say.append(f"{spread(times)} times the floor")
        if "ray.data" in ways and name != "ray.data":
            times = [a / b for a, b in zip(seconds["ray.data"], seconds[name], strict=True)]
            say.append(f"{spread(times)} times as fast as ray.data")
        print(f"  {name:24s}", ", ".join(say), flush=True)
        figures[name] = {"seconds": seconds[name], "megabytes": memory[name]}
    return figures


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def measure(way: Callable[[], int], store_gib: float) -> tuple[float, float, float, int]:
    """(seconds, peak and idle megabytes, rows kept) of one way in a fresh Ray."""
    ray.init(
        address="local",
        num_cpus=_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=int(store_gib * 2**30),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.get([_nothing.remote() for _ in range(2 * _CPUS)])  # workers are there
    with Peak() as peak:
        begun = time.monotonic()
        kept = way()
        seconds = time.monotonic() - begun
    ray.shutdown()
    return seconds, peak.peak / 1e6, peak.before / 1e6, kept


@ray.remote
def _nothing() -> None:
    pass


class Peak:
    """PSS of this process and all its children together, in bytes: at the start, and at most."""

    def __enter__(self) -> "Peak":
        self.before = self.peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        me = psutil.Process()
        total = 0
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                total += process.memory_full_info().pss
        return total


if __name__ == "__main__":
    main()
