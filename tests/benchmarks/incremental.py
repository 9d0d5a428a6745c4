"""What a rerun pays: a thousand shards unchanged, one percent of rows new, rows looked up.

    python tests/benchmarks/incremental.py shards              # on SeaweedFS, counted by a proxy
    python tests/benchmarks/incremental.py grow CORPUS MODEL   # a Parquet file, a small model
    python tests/benchmarks/incremental.py lookup

Each prints its figures; none is a test.
"""

import argparse
import io
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import CHATML, make_tokenizer, s3_server, tiny_model
from fault_proxy import FaultProxy
from faults import make_rows

from pipeline import config, reuse, run
from pipeline.schemas import PART


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    shards = commands.add_parser("shards")
    shards.add_argument("--shards", type=int, default=1000)
    shards.set_defaults(command=rerun_of_many_shards)
    grow = commands.add_parser("grow")
    grow.add_argument("corpus", type=Path)
    grow.add_argument("model", type=Path)
    grow.add_argument("--rows", type=int, default=39_600)
    grow.add_argument("--shards", type=int, default=8)
    grow.set_defaults(command=grown_corpus)
    lookup = commands.add_parser("lookup")
    lookup.add_argument("--rows", type=int, default=1_000_000)
    lookup.set_defaults(command=look_up)
    arguments = vars(parser.parse_args())
    arguments.pop("command")(**arguments)


def rerun_of_many_shards(shards: int) -> None:
    """Seconds and requests of a first run, of a rerun, and of one with a shard more."""
    with bucket() as s3, FaultProxy(s3.endpoint) as proxy:
        rows, fs = make_rows(4 * shards, seed=0), s3.filesystem()

        def put(number: int, some: list[dict[str, str]]) -> None:
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(some), sink)
            fs.pipe_file(s3.url("corpus", f"shard-{number:05d}.parquet"), sink.getvalue())

        for number in range(shards):
            put(number, rows[number::shards])
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        start_ray()
        job = config.parse(
            {
                "input": {"path": s3.url("corpus")},
                "output": s3.url("out"),
                "model": {"path": make_model(), "dtype": "float32"},
            }
        )
        for what in ("first run", "rerun", "one shard more"):
            if what == "one shard more":
                put(shards, make_rows(4, seed=1))
            proxy.requests.clear()
            begun = time.monotonic()
            summary = run.run(job).summary
            seconds = time.monotonic() - begun
            count = len(proxy.requests)
            print(
                f"{what:15s} {seconds:7.1f} s, {count:6d} requests, "
                f"{summary.units_scored} of {summary.units_total} units scored"
            )
            if what == "rerun":
                for (method, kind), number in sorted(Counter(map(_kind, proxy.requests)).items()):
                    print(f"    {number:4d} {method:4s} {kind}")
        ray.shutdown()


def _kind(request: tuple[str, str]) -> tuple[str, str]:
    method, target = request
    return method, "listing" if "list-type" in target else target.partition("?")[0]


def grown_corpus(corpus: Path, model: Path, rows: int, shards: int) -> None:
    """Tokens scored again when 1 % of the rows are new, three times over, each in its own way."""
    table = pq.read_table(corpus)
    # It is sorted by task: its last 1 % of rows would hold 1.8 % of its tokens.
    table = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        job = config.parse(
            {
                "input": {"path": f"{folder}/corpus"},
                "output": f"{folder}/out",
                "model": {"path": str(model)},
            }
        )
        Path(folder, "corpus").mkdir()
        write(folder, table.slice(0, rows), shards)
        first = run.score(job).summary
        print(
            f"first run             {first.tokens_scored:,} tokens for {first.rows:,} rows in "
            f"{first.seconds:.0f} s",
            flush=True,
        )
        for way in ("a new shard", "all shards rewritten", "one growing file"):
            new, rows = rows // 100, rows + rows // 100
            if way == "a new shard":
                added = table.slice(rows - new, new)
                pq.write_table(added, f"{folder}/corpus/shard-{shards:03d}.parquet")
            elif way == "all shards rewritten":  # in another order, every row in another shard
                order = np.random.default_rng(0).permutation(rows)
                write(folder, table.take(pa.array(order)), shards + 1)
            else:
                for old in Path(folder, "corpus").iterdir():
                    old.unlink()
                write(folder, table.slice(0, rows), 1)
            again = run.score(job).summary
            print(
                f"{way:21s} {again.tokens_scored:,} tokens "
                f"({100 * again.tokens_scored / first.tokens_scored:.2f} % of the first run's), "
                f"{new:,} new rows of {rows:,} in {again.seconds:.0f} s, "
                f"{again.rows_reused:,} rows reused",
                flush=True,
            )
    ray.shutdown()


def write(folder: str, table: pa.Table, pieces: int) -> None:
    size = -(-len(table) // pieces)
    for number in range(pieces):
        pq.write_table(
            table.slice(number * size, size), f"{folder}/corpus/shard-{number:03d}.parquet"
        )


def look_up(rows: int) -> None:
    """Bytes of a million known rows, time to collect them, time to look a million up."""
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        source = np.random.default_rng(0)
        ids = [source.bytes(16) for _ in range(rows)]
        per_part = 10_000
        urls = []
        for start in range(0, rows, per_part):
            urls.append(f"{folder}/{start}.parquet")
            pq.write_table(a_part(ids[start : start + per_part]), urls[-1])
        begun = time.monotonic()
        known = reuse.gather(urls)
        tables = ray.get(list(known.buckets))
        collected = time.monotonic() - begun
        size = sum(table.nbytes for table in tables)
        asked = [ids[i] for i in source.permutation(rows)]
        begun = time.monotonic()
        found = sum(
            len(reuse.find(known, asked[start : start + per_part])[0])
            for start in range(0, rows, per_part)
        )
        print(
            f"{rows:,} known rows: {size / 2**20:.0f} MiB a node, collected in {collected:.1f} s; "
            f"{found:,} of {rows:,} looked up in {time.monotonic() - begun:.1f} s, "
            f"{per_part:,} at a time, by one process"
        )
    ray.shutdown()


def a_part(ids: list[bytes]) -> pa.Table:
    turn = {
        "num_response_tokens": 40,
        "num_direct_tokens": 40,
        "nll_conditioned": 80.5,
        "nll_direct": 100.5,
    }
    row: dict[str, Any] = {
        "status": "ok",
        "num_prompt_tokens": 30,
        "truncated": False,
        "ifd_loss_ratio": 0.8,
        "ifd_ppl_ratio": 0.6,
        "turns": [turn],
        **turn,
    }
    rows = [{**row, "row_index": index, "sample_id": i} for index, i in enumerate(ids)]
    return pa.Table.from_pylist(rows, schema=PART)


@contextmanager
def bucket() -> Any:
    class Factory:
        def mktemp(self, name: str) -> Path:
            return Path(tempfile.mkdtemp(prefix=name))

    yield from s3_server.__wrapped__(Factory())  # the tests' fixture


def make_model() -> str:
    folder = tempfile.mkdtemp(prefix="cherry-model-")
    tiny_model("Llama", max_position_embeddings=2048).save_pretrained(folder)
    make_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder


def start_ray() -> None:
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


if __name__ == "__main__":
    main()
