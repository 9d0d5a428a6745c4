"""A scorer that sleeps a fixed time for each token: what Ray does around a model, without one.

Its process imports no torch, so eight of them fit a small machine.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from pipeline.schemas import PART, flat_lists, from_ipc, hand_on

SECONDS_PER_TOKEN = "CHERRY_TEST_SECONDS_PER_TOKEN"
SCORERS = "CHERRY_TEST_SCORERS"
"""A folder that gets a file of each process that scored: named by its node, its seconds of work."""


class SleepingScorer:
    """In the place of `UnitScorer`."""

    def __init__(self, scoring: Any) -> None:
        self._asleep = 0.0

    def __call__(self, batch: pa.Table) -> pa.Table:
        assert "torch" not in sys.modules
        started = time.time()
        tokens = from_ipc(batch["tokens"][0].as_buffer())
        _, ids = flat_lists(tokens["input_ids"])
        seconds = len(ids) * float(os.environ[SECONDS_PER_TOKEN])
        time.sleep(seconds)
        self._asleep += seconds
        node = ray.get_runtime_context().get_node_id()
        (Path(os.environ[SCORERS]) / f"{node}-{os.getpid()}").write_text(str(self._asleep))
        rows = [
            {
                "row_index": row["row_index"],
                "sample_id": row["sample_id"],
                "status": "ok",
                "num_prompt_tokens": row["num_prompt_tokens"],
                "num_response_tokens": 1,
                "num_direct_tokens": 1,
                "truncated": False,
                "nll_conditioned": 1.0,
                "nll_direct": 2.0,
                "ifd_loss_ratio": 0.5,
                "ifd_ppl_ratio": 0.4,
                "turns": [],
            }
            for row in tokens.select(["row_index", "sample_id", "num_prompt_tokens"]).to_pylist()
        ]
        part = pa.Table.from_pylist(rows, schema=PART)
        unit = batch["unit"][0].as_py()
        part = part.replace_schema_metadata({"cherry.unit": unit})
        return hand_on(unit, part=part, num_tokens=len(ids), started=started)


def main(config_path: str, address: str, seconds_per_token: str, scorers: str) -> None:
    """`cherry score` with it."""
    from pipeline import config, run, scoring

    scoring.UnitScorer = SleepingScorer  # type: ignore[assignment,misc]
    variables = {SECONDS_PER_TOKEN: seconds_per_token, SCORERS: scorers}
    ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False)
    summary = run.score(config.load(config_path)).summary
    sys.stdout.write(json.dumps({"rows_by_status": summary.rows_by_status}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
