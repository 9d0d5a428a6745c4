"""What a cherry subset is worth: the base model trained on it, and on controls, several times.

::

    arms      cherry | random_rows, as many rows | random_tokens, as many tokens | all
    seeds     each arm is drawn, ordered and trained anew for each of them
    judged    by the loss of held-out answers along the way, and by answers given exactly

Rows of held-out sets are left out of every arm. Each training is kept by its manifest, so that a
comparison that was killed goes on where it was; models are not kept.
"""

import functools
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage, training, training_data
from pipeline.batches import count_steps
from pipeline.config import InputConfig
from pipeline.config_training import Arm, CompareConfig, TrainConfig
from pipeline.curves import draw_curves
from pipeline.errors import InputError
from pipeline.inputs import Corpus, open_corpus
from pipeline.job import Job
from pipeline.manifests import Finished
from pipeline.phases import open_subset
from pipeline.training_data import Examples
from pipeline.training_job import HeldOut, plan_training
from pipeline.units import Plan, fingerprint
from pipeline.watching import Progress

_INPUT = "input"
"""Name of the set that is held out of the input."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    url: str
    """Directory of report.json and the curves."""
    report: dict[str, Any]


def open_sets(config: CompareConfig, output: str) -> dict[str, Corpus]:
    """The held-out sets that have files of their own, by name.

    Raises:
        InputError: One is missing or cannot be read.
    """
    return {
        each.name: open_corpus(
            InputConfig(path=each.path, layout=each.layout, columns=each.columns), output
        )
        for each in config.evaluate
    }


def compare(
    job: Job,
    scored: Plan,
    selected: Finished,
    held_out: dict[str, Corpus],
    config: CompareConfig,
    train: TrainConfig,
    progress: Progress,
) -> Comparison:
    """Train every arm with every seed, unless that is done, and say how they compare.

    Args:
        job: Of the base model.
        scored: The units that were selected from.
        selected: The cherry subset.
        held_out: From `open_sets`.
        config: Arms, seeds and held-out sets.
        train: How each is trained.
        progress: Told of each step.

    Raises:
        InputError: An arm or a held-out set has no rows.
    """
    whole, _ = training_data.tokenise_rows(scored.units, job.settings)
    subset = open_subset(job, selected)
    cherry, left_out = training_data.tokenise_corpus(subset, job.settings)
    training_data.refuse_empty(cherry, left_out, "the cherry subset")
    sets = _held_out_sets(job, config, held_out, whole)
    held = np.concatenate([_contents(table) for table in sets.values()])
    whole, cherry = _without(whole, held), _without(cherry, held)
    if not len(cherry):
        raise InputError(
            "compare: all rows of the cherry subset are held out, expected some to train on. Lower "
            "compare.holdout_rows, select more rows, or take out the set under evaluate that has "
            "them too."
        )
    # The subset has no copies where selecting drops them: nor has what it is compared with.
    pool = _distinct(whole) if job.config.select.duplicates == "drop" else whole
    watched = HeldOut({name: _keep(job, table) for name, table in sets.items()}, config.points)
    steps = count_steps(len(cherry), train)
    planned = []
    for arm in config.arms:
        for seed in config.seeds:
            rows = whole if arm == "all" else _draw(arm, seed, cherry, pool)
            settings = train.model_copy(
                update={"seed": seed} | ({"max_steps": steps} if config.same == "steps" else {})
            )
            job_of_arm = plan_training(job, arm, _digest(rows), settings, watched, keep_model=False)
            planned.append((job_of_arm, functools.partial(_given, rows)))
    done = iter(training.train_all(planned, job.config.cluster, progress))
    return _conclude(job, config, {arm: [next(done) for _ in config.seeds] for arm in config.arms})


def _given(rows: pa.Table) -> tuple[pa.Table, int]:
    return rows, 0


def _held_out_sets(
    job: Job, config: CompareConfig, held_out: dict[str, Corpus], whole: pa.Table
) -> dict[str, pa.Table]:
    """The rows of each set, in the EXAMPLES schema."""
    sets = {}
    if config.holdout_rows:
        # By id, which is a hash: the same rows of a corpus that has grown or lies otherwise. From
        # its end: selecting goes by its beginning among rows with the same score.
        ids = sorted(whole["sample_id"].unique().to_pylist(), key=lambda each: each[::-1])
        chosen = pa.array(ids[: config.holdout_rows], pa.binary(16))
        held = whole.filter(pc.is_in(whole["sample_id"], chosen))
        if len(held) == len(whole):
            raise InputError(
                f"compare.holdout_rows: got {config.holdout_rows}, expected fewer than the "
                f"{len(whole)} rows of the input that can be trained on."
            )
        sets[_INPUT] = _distinct(held)
    for each in config.evaluate:
        table, left_out = training_data.tokenise_corpus(
            held_out[each.name], job.settings, each.max_rows
        )
        training_data.refuse_empty(table, left_out, f"held-out set {each.name} ({each.path})")
        sets[each.name] = table
    return sets


def _contents(table: pa.Table) -> npt.NDArray[np.bytes_]:
    """Of each row a hash of its tokens, and of which of them have a loss.

    Rows that differ in what nobody answered, or in their layout, are the same to a training.
    """
    rows = Examples.from_table(table)
    spans = [rows.span(row) for row in range(len(rows))]
    hashes = [
        hashlib.blake2b(
            rows.ids[span].tobytes() + rows.targets[span].tobytes(), digest_size=16
        ).digest()
        for span in spans
    ]
    return np.array(hashes, "S16")


def _distinct(table: pa.Table) -> pa.Table:
    """The first of rows that are the same to a training."""
    _, first = np.unique(_contents(table), return_index=True)
    return table.take(pa.array(np.sort(first)))


def _without(table: pa.Table, contents: npt.NDArray[np.bytes_]) -> pa.Table:
    return table.filter(pa.array(~np.isin(_contents(table), contents)))


def _draw(arm: Arm, seed: int, cherry: pa.Table, whole: pa.Table) -> pa.Table:
    """The rows of an arm; a random subset has the rows or, within half a row, the tokens."""
    if arm == "cherry":
        return cherry
    order = np.random.default_rng([seed, 1]).permutation(len(whole))
    if arm == "random_rows":
        count = min(len(cherry), len(whole))
    else:
        wanted = _tokens(cherry).sum()
        sums = np.concatenate([[0], np.cumsum(_tokens(whole)[order])])
        count = max(1, int(np.abs(sums - wanted).argmin()))
    return whole.take(pa.array(np.sort(order[:count])))


def _tokens(table: pa.Table) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = (
        pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    )
    return lengths


def _digest(table: pa.Table) -> str:
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _keep(job: Job, table: pa.Table) -> str:
    output = storage.absolute(job.config.output)
    url = storage.join(output, "comparison", "held_out", f"{_digest(table)[:16]}.parquet")
    training_data.save_examples(url, table)
    return url


def _conclude(job: Job, config: CompareConfig, runs: dict[Arm, list[Finished]]) -> Comparison:
    """Put the trainings together, and write the report last."""
    exact = [each.name for each in config.evaluate if each.exact_match]
    names = [_INPUT] * bool(config.holdout_rows) + [each.name for each in config.evaluate]
    arms = {arm: [run.manifest for run in of_arm] for arm, of_arm in runs.items()}
    report = {
        "base_model": job.settings.model.path,
        "same": config.same,
        "seeds": config.seeds,
        "trainings": {arm: [run["train_fingerprint"] for run in of] for arm, of in arms.items()},
        "before": {name: _before(arms, name, exact) for name in names},
        "arms": [
            {
                "arm": arm,
                "rows": [run["rows"] for run in of_arm],
                "tokens": [run["tokens"] for run in of_arm],
                "steps": [run["history"][-1]["step"] for run in of_arm],
                "loss": {n: [_judged(r, n, -1)["loss"] for r in of_arm] for n in names},
                "exact_match": {
                    n: [_judged(r, n, -1)["exact_match"] for r in of_arm] for n in exact
                },
                "curves": {n: [_curve(r, n) for r in of_arm] for n in names},
            }
            for arm, of_arm in arms.items()
        ],
    }
    url = storage.join(
        storage.absolute(job.config.output), "comparison", fingerprint({"report": report})
    )
    for suffix in ("png", "svg"):
        storage.replace(storage.join(url, f"curves.{suffix}"), draw_curves(report, suffix))
    storage.publish(storage.join(url, "report.json"), json.dumps(report, indent=1).encode())
    return Comparison(url, report)


def _before(arms: dict[Arm, list[dict[str, Any]]], name: str, exact: list[str]) -> dict[str, float]:
    """What the base model says of a held-out set: the first point of any training."""
    judged = _judged(next(iter(arms.values()))[0], name, 0)
    return {key: value for key, value in judged.items() if key == "loss" or name in exact}


def _judged(manifest: dict[str, Any], name: str, at: int) -> dict[str, float]:
    """What a training says of a held-out set, at its first or last point."""
    points = [step for step in manifest["history"] if "held_out" in step]
    judged: dict[str, float] = points[at]["held_out"][name]
    return judged


def _curve(manifest: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """(step, loss) of a held-out set."""
    return [
        (step["step"], step["held_out"][name]["loss"])
        for step in manifest["history"]
        if "held_out" in step
    ]
