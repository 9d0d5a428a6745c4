"""The whole job from bucket to bucket, as a user runs it, on a cluster that is already there."""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import REPOSITORY, ROWS, S3
from typer.testing import CliRunner

from pipeline.cli import app

pytestmark = [pytest.mark.s3, pytest.mark.ray]

SECRETS = (b"cherry-test-secret", b"cherry-test")  # what s3_server puts into the environment

_CLUSTER = """
import sys, ray
context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
                   object_store_memory=200_000_000, _temp_dir=sys.argv[1])
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        assert self.code == 0, self.stderr
        return dict(json.loads(self.stdout))


@dataclass(frozen=True)
class Job:
    """A config over a corpus in a bucket, and a cluster to run it on."""

    config: Path
    cache: Path
    address: str
    ray_folder: Path
    output: str

    def cherry(self, *arguments: str) -> Done:
        command, *options = arguments
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", command, str(self.config), *options, "--json"],
            cwd=REPOSITORY, env={**os.environ, "RAY_ADDRESS": self.address},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def job(s3_server: S3, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Forty rows as two Parquet shards and a gzipped JSONL in the bucket; nothing run yet."""
    folder = tmp_path_factory.mktemp("s3-job")
    fs = s3_server.filesystem()
    for name, rows in (("shard-0.parquet", ROWS[:15]), ("shard-1.parquet", ROWS[15:30])):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        fs.pipe_file(s3_server.url("job/corpus", name), sink.getvalue())
    text = "\n".join(json.dumps(row) for row in ROWS[30:])
    fs.pipe_file(s3_server.url("job/corpus/late.jsonl.gz"), gzip.compress(text.encode()))
    config = folder / "job.yaml"
    output = s3_server.url("job/cherry")
    raw = {
        "input": {"path": s3_server.url("job/corpus")},
        "output": output,
        "model": {"path": str(model_dir), "dtype": "float32", "cache_dir": str(folder / "cache")},
        "score": {"unit_rows": 10},
        "select": {"fraction": 0.25},
    }
    config.write_text(yaml.safe_dump(raw))
    # Short: Ray's sockets lie in it, and their paths may have 107 characters. Its workers must
    # have the server's keys in their environment, which those of `ray_local` need not have.
    ray_folder = Path(tempfile.mkdtemp(prefix="cherry-", dir="/tmp"))
    cluster = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER, str(ray_folder)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        yield Job(config, folder / "cache", address, ray_folder, output)
    finally:
        cluster.stdin.close()
        cluster.wait(timeout=60)
        cluster.stdout.close()
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def first(job: Job) -> Done:
    """The first run of the job."""
    return job.cherry("run")


def objects_under(s3_server: S3, url: str) -> dict[str, tuple[str, str]]:
    """Key -> (ETag, time) of every object: equal listings mean that nothing was written."""
    fs = s3_server.filesystem()
    found = fs.find(url, detail=True)
    return {name: (info["ETag"], str(info["LastModified"])) for name, info in found.items()}


def scores_at(s3_server: S3, url: str) -> pa.Table:
    """All parts, in the order of shards and rows."""
    fs = s3_server.filesystem()
    tables = []
    for name in fs.ls(url, detail=False):
        table = pq.read_table(io.BytesIO(fs.cat_file(name)))
        shard = json.loads(table.schema.metadata[b"cherry.unit"])["shard_url"]
        table = table.append_column("shard", pa.array([shard] * len(table)))
        tables.append(table.replace_schema_metadata(None))
    return pa.concat_tables(tables).sort_by([("shard", "ascending"), ("row_index", "ascending")])


def test_scores_selection_manifest_and_pointer_are_in_the_bucket(
    s3_server: S3, job: Job, first: Done
) -> None:
    summary = first.summary
    fs = s3_server.filesystem()
    assert summary["rows_by_status"] == {"ok": len(ROWS)}
    assert summary["units_scored"] == summary["units_total"] == 5  # 15 + 15 + 10 rows by tens
    assert summary["scores_path"] == f"{job.output}/scores/{summary['score_fingerprint']}"
    scores = scores_at(s3_server, summary["scores_path"])
    assert scores["row_index"].to_pylist() == [*range(10), *range(15), *range(15)]
    assert scores["ifd_loss_ratio"].null_count == 0

    latest = json.loads(fs.cat_file(f"{job.output}/LATEST.json"))
    assert f"{job.output}/{latest['manifest']}" == summary["manifest"]
    manifest = json.loads(fs.cat_file(summary["manifest"]))
    assert manifest["selected_rows"] == summary["selected_rows"] == 10
    (part,) = manifest["parts"]
    data = fs.cat_file(f"{summary['cherry_path']}/{part['path']}")
    assert hashlib.sha256(data).hexdigest() == part["sha256"]
    cherry = pq.read_table(io.BytesIO(data))
    assert cherry["rank"].to_pylist() == list(range(10))
    best = sorted((r for r in scores["ifd_loss_ratio"].to_pylist() if r < 1), reverse=True)[:10]
    assert cherry["ifd_loss_ratio"].to_pylist() == best
    texts = {row["instruction"]: row for row in ROWS}
    for row in cherry.select(["instruction", "input", "output"]).to_pylist():
        assert row == texts[row["instruction"]]


def test_the_bucket_holds_nothing_else(s3_server: S3, job: Job, first: Done) -> None:
    fingerprint = first.summary["score_fingerprint"]
    names = [
        name.removeprefix("cherry/job/cherry/") for name in objects_under(s3_server, job.output)
    ]
    kinds = sorted(name.split("/")[0] for name in names)
    once = ["LATEST.json", "cherry", "cherry", "configs", "ingest", "ingest", "ingest", "ledger"]
    assert kinds == [*once, *["scores"] * 5]
    assert all(n.split("/")[1] == fingerprint for n in names if n.startswith("scores/"))


def test_a_rerun_scores_and_writes_nothing(s3_server: S3, job: Job, first: Done) -> None:
    before = objects_under(s3_server, job.output)
    again = job.cherry("run").summary
    assert (again["units_scored"], again["tokens_scored"], again["tokens_per_s"]) == (0, 0, None)
    assert (again["units_reused"], again["rows_reused"]) == (5, len(ROWS))
    for key in ("manifest", "cut", "selected_rows", "score_fingerprint", "rows_by_status"):
        assert again[key] == first.summary[key]
    assert objects_under(s3_server, job.output) == before


def test_a_model_in_the_bucket_gives_the_scores_of_the_directory(
    s3_server: S3, job: Job, first: Done, model_dir: Path
) -> None:
    url = s3_server.url("job/model")
    s3_server.filesystem().put(f"{model_dir}/", url, recursive=True)
    summary = job.cherry("score", "--set", f"model.path={url}").summary
    assert summary["units_scored"] == 5
    assert summary["selected_rows"] is None
    assert summary["score_fingerprint"] != first.summary["score_fingerprint"]
    from_bucket = scores_at(s3_server, summary["scores_path"])
    assert from_bucket.equals(scores_at(s3_server, first.summary["scores_path"]))
    fetched = {path.name for path in job.cache.rglob("models/*/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched


def test_a_model_in_the_bucket_without_weights_is_refused(
    s3_server: S3, job: Job, model_dir: Path
) -> None:
    url = s3_server.url("job/no-weights")
    s3_server.filesystem().put(str(model_dir / "config.json"), f"{url}/config.json")
    done = CliRunner().invoke(app, ["run", str(job.config), "--set", f"model.path={url}"])
    assert (done.exit_code, done.stdout) == (2, "")
    expected = f"cherry: model.path {url}: expected config.json and *.safetensors, has: config.json"
    assert expected in done.stderr


def test_no_secret_is_in_a_command_line_or_an_error(
    s3_server: S3, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run whose credentials are refused, and of every process while it is on."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-test-secret")
    running = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(job.config)],
        cwd=REPOSITORY, env={**os.environ, "RAY_ADDRESS": job.address},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines: set[bytes] = set()
    while running.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has just ended
                lines.add(path.read_bytes())
    stdout, stderr = running.communicate()
    assert running.returncode == 2, stderr
    assert b"denied" in stderr
    assert any(b"pipeline" in line for line in lines)
    for seen in (stdout, stderr, *lines):
        assert not any(secret in seen for secret in (b"another-test-secret", *SECRETS))


def test_no_secret_is_written_or_shown(s3_server: S3, job: Job, first: Done) -> None:
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() == SECRETS[0]
    assert os.environ["AWS_ACCESS_KEY_ID"].encode() == SECRETS[1]
    fs = s3_server.filesystem()
    seen = {"stdout": first.stdout.encode(), "stderr": first.stderr.encode()}
    for name in fs.find(job.output):
        seen[name] = fs.cat_file(name)
        if name.endswith(".parquet"):  # its pages are compressed
            table = pq.read_table(io.BytesIO(seen[name]))
            seen[f"{name} unpacked"] = f"{table.to_pylist()} {table.schema.metadata}".encode()
    for path in [*job.cache.rglob("*"), *job.ray_folder.rglob("logs/**/*")]:
        if path.is_file() and not path.is_symlink():
            seen[str(path)] = path.read_bytes()
    assert len(seen) > 20
    assert [name for name, data in seen.items() if any(s in data for s in SECRETS)] == []
