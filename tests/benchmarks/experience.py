"""Brief experience on real rows: how long each step takes, and what it does to IFD.

    python tests/benchmarks/experience.py CORPUS MODEL [--rows 5000] [--held-out 300]

Embeds the prompts of the first rows of a Parquet file, chooses 1,000 of them (100 clusters, 10 of
each), trains the model on these for one epoch, and scores the rows after the first ones by the
model before and after. Prints figures; none is a test.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray

from pipeline import cluster, config, phases, run
from pipeline.job import check
from pipeline.training_loop import StepDone
from pipeline.watching import Pace


class Lines:
    """Progress, a line each."""

    def phase(self, name: str) -> None:
        """What begins."""
        print(name, flush=True)

    def unit(self, pace: Pace) -> None:
        """A unit."""

    def step(self, step: StepDone) -> None:
        """A step."""
        print(
            f"  step {step.step} of {step.num_steps}: loss {step.loss:.4f}, {step.tokens:,} tokens "
            f"in {step.seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--held-out", type=int, default=300)
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder, cluster.connected():
        table = pq.read_table(options.corpus)
        for name, start, count in (
            ("rows", 0, options.rows),
            ("held", options.rows, options.held_out),
        ):
            pq.write_table(table.slice(start, count), f"{folder}/{name}.parquet")
        base = {
            "input": {"path": f"{folder}/rows.parquet"},
            "output": f"{folder}/out",
            "model": {"path": str(options.model)},
            "experience": {},
        }
        job = config.parse(base)
        describe("before", config.parse(held_out(base, folder, str(options.model))))
        begun = time.monotonic()
        found, _ = run.experience(job, Lines())
        print(
            f"embedded {found.manifest['rows_by_status']['ok']:,} prompts and chose "
            f"{found.manifest['selected_rows']:,} rows in {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        begun = time.monotonic()
        trained = phases.with_experienced_model(
            check(job, selecting=False), Lines()
        ).config.model.path
        print(f"trained in {time.monotonic() - begun:.0f} s", flush=True)
        describe("after", config.parse(held_out(base, folder, trained)))


def held_out(base: dict[str, Any], folder: str, model: str) -> dict[str, Any]:
    """Score the held-out rows with a model."""
    return {
        "input": {"path": f"{folder}/held.parquet"},
        "output": f"{folder}/held",
        "model": {"path": model},
    }


def describe(when: str, job: config.Config) -> None:
    """Score, and say how the ratios lie."""
    summary = run.score(job).summary
    scores = ds.dataset(summary.scores_path).to_table()
    ratios = scores["ifd_loss_ratio"].drop_null().to_numpy()
    tokens = pc.sum(scores["num_response_tokens"]).as_py()
    print(
        f"{when}: {len(ratios)} of {summary.rows} held-out rows scored, "
        f"{100 * np.mean(ratios >= 1):.1f} % with an IFD of 1 or more, "
        f"median {np.median(ratios):.4f}; conditioned loss "
        f"{pc.sum(scores['nll_conditioned']).as_py() / tokens:.4f}, direct "
        f"{pc.sum(scores['nll_direct']).as_py() / tokens:.4f} nats a token; "
        f"{summary.tokens_scored:,} tokens in {summary.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
