"""Jobs that `cherry submit` puts on a real cluster of three raylets, from bucket to bucket."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import yaml
from conftest import REPOSITORY, S3, write_parquet
from faults_cluster import SCORER, Machines, machines, wait_until
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus, JobSubmissionClient
from typer.testing import CliRunner

from pipeline import errors, following, submitting
from pipeline.cli import app
from pipeline.following import _Lines

ConfigFile = Callable[..., Path]


@pytest.fixture(scope="module")
def cluster(s3_server: S3) -> Iterator[Machines]:
    with machines(2, dashboard=True) as found:
        yield found


@pytest.fixture(scope="module")
def client(cluster: Machines) -> JobSubmissionClient:
    return JobSubmissionClient(cluster.dashboard)


@pytest.fixture
def config_file(tmp_path: Path, model_dir: Path, s3_server: S3) -> ConfigFile:
    """A config in a folder that the job never sees, from a bucket and into it."""

    def write(rows: list[dict[str, Any]], name: str, **score: Any) -> Path:
        shard = write_parquet(tmp_path / f"{name}.parquet", rows)
        s3_server.filesystem().put(str(shard), f"cherry/{name}/corpus/a.parquet")
        config = {
            "input": {"path": s3_server.url(name, "corpus")},
            "output": s3_server.url(name, "out"),
            "model": {"path": str(model_dir), "dtype": "float32"},
            "score": {"unit_rows": 20, **score},
            "select": {"max_ifd": None},
            "cluster": {"actors": 2, "threads_per_actor": 1},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def rows(count: int, response: str = "three four five six") -> list[dict[str, Any]]:
    return [
        {"instruction": f"one two {n}", "input": "", "output": f"{response} {n}".strip()}
        for n in range(count)
    ]


def submit(path: Path, cluster: Machines, *options: str) -> "subprocess.Popen[str]":
    """`cherry submit` somewhere else than the repository, as a user runs it."""
    arguments = ["submit", str(path), "--address", cluster.dashboard, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": "127.0.0.1:9"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def await_from(command: "subprocess.Popen[str]", condition: Callable[[], Any], what: str) -> Any:
    """What a command brings about; if it ends before, what it said."""

    def met() -> Any:
        return condition() or (
            command.poll() is not None and pytest.fail(str(command.communicate()))
        )

    return wait_until(met, what)


@pytest.mark.ray
def test_a_job_uses_all_actors_and_survives_a_dead_node(
    cluster: Machines, client: JobSubmissionClient, config_file: ConfigFile
) -> None:
    path = config_file(rows(1200), "survives")
    command = submit(path, cluster, "--wait", "--json", "--env", "CHERRY_TEST=1")
    await_from(command, lambda: len(cluster.workers(SCORER)) == 2, "both actors")
    cluster.kill_node(0.7)
    out, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    summary = json.loads(out)
    assert summary["rows_by_status"] == {"ok": 1200}
    assert summary["selected_rows"] == 120
    assert "scoring 60 of 60 units, 2 resident models" in err
    (job,) = [job for job in client.list_jobs() if job.submission_id in err]
    assert job.runtime_env["env_vars"] == {"CHERRY_TEST": "1"}
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in job.model_dump_json()
    assert re.fullmatch(r"cherry-run-\d{8}-[0-9a-f]{8}", job.submission_id)
    cluster.restore()


@pytest.mark.ray
def test_exit_codes_pass_through(
    cluster: Machines, client: JobSubmissionClient, config_file: ConfigFile
) -> None:
    """Too many malformed rows are 3, and an input that only the job finds missing is 2."""
    many = config_file(rows(10) + [{"instruction": None, "input": "", "output": "x"}] * 10, "bad")
    missing = config_file(rows(1), "missing")
    config = yaml.safe_load(missing.read_text())
    missing.write_text(yaml.safe_dump(config | {"input": {"path": "s3://cherry/nowhere"}}))
    commands = [submit(path, cluster, "--wait") for path in (many, missing)]
    said = [command.communicate(timeout=300) for command in commands]
    assert [command.returncode for command in commands] == [3, 2], said
    assert "50.00 % of the rows failed" in said[0][0]
    assert "s3://cherry/nowhere" in said[1][0]


@pytest.mark.ray
def test_the_same_job_is_not_started_twice_at_once(
    cluster: Machines, client: JobSubmissionClient, config_file: ConfigFile
) -> None:
    path = config_file(rows(1200), "twice")
    both = [submit(path, cluster, "--json") for _ in range(2)]
    said = [json.loads(command.communicate(timeout=120)[0]) for command in both]
    (name,) = {each["submission_id"] for each in said}
    assert sorted(each["started"] for each in said) == [False, True]
    # A third, which follows it from a terminal, and stops it there.
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "submit", str(path), "--wait",
         "--address", cluster.dashboard],
        cwd=path.parent, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    read_until(ours, "resident model")
    os.kill(command.pid, signal.SIGINT)
    read_until(ours, "detach and let it run?")
    os.write(ours, b"s\n")
    read_until(ours, f"stopped {name}")
    assert command.wait(timeout=60) == errors.EXIT_FAILED
    os.close(ours)
    assert client.get_job_status(name) == JobStatus.STOPPED
    # What was stopped may be started again, under a name of its own.
    again = submit(path, cluster, "--wait", "--json")
    assert again.stderr is not None
    started = next(line for line in again.stderr if "started" in line)
    assert f"started {name}-2" in started
    os.killpg(again.pid, signal.SIGINT)  # where nobody can be asked, it goes on
    _, err = again.communicate(timeout=60)
    assert again.returncode == errors.EXIT_INTERRUPTED, err
    assert f"detached from {name}-2" in err
    ended = wait_until(
        lambda: (s := client.get_job_status(f"{name}-2")).is_terminal() and s, "its end"
    )
    assert ended == JobStatus.SUCCEEDED


def test_ctrl_c_is_heard_where_the_connection_fails_to_close() -> None:
    statuses = iter([JobStatus.RUNNING, JobStatus.SUCCEEDED])

    class Client:
        def get_job_info(self, _: str) -> Any:
            return SimpleNamespace(status=next(statuses))

        def get_job_logs(self, _: str) -> str:
            return "one\n"

        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            yield "one\n"
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(60)
            finally:
                raise aiohttp.ClientConnectionResetError("closing transport")

    job: Any = SimpleNamespace(client=Client(), submission_id="a", address="http://head:8265")
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        following.follow(job, said.append)
    assert said == ["one"]


def read_until(terminal: int, text: str) -> str:
    said = ""
    while text not in said:
        try:
            said += os.read(terminal, 4096).decode()
        except OSError as err:  # whoever wrote is gone
            raise AssertionError(f"{text!r} is not in {said}") from err
    return said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--env", "AWS_SECRET_ACCESS_KEY=abc"), "it looks like a secret"),
        (("--env", "HF_TOKEN=abc"), "it looks like a secret"),
        (("--env", "PROXY=http://me:word@host"), "it looks like a secret"),
        (("--env", "REGION"), "expected NAME=value"),
        (("--env", "PGPASS=word"), "it looks like a secret"),
        (("--env", "AWS_ACCESS_KEY_ID=abc"), "it looks like a secret"),
        (
            ("--command", "select", "--retry-errors"),
            "--retry-errors: cherry select scores nothing, expected --command run, score or exper",
        ),
        (("--extra", "gpu"), "no such extra, expected one of azure, dev, gcs, gguf, lora"),
        (("--set", "output=out"), "key 'output': got the relative path 'out'"),
        (("--set", "input.path=a.parquet"), "key 'input.path': got the relative path"),
        (("--set", "model.path=here.gguf"), "key 'model.path': got the relative path"),
        (("--set", "select.fractoin=0.1"), "Did you mean 'select.fraction'?"),
        (("--address", "head:8265"), "--address head:8265: expected http://head:8265."),
        ((), "--address http://127.0.0.1:9: no Ray cluster takes jobs there"),
    ],
)
def test_what_cannot_work_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    """All but the last are refused before a cluster is looked for."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # and put back, whatever is set in it
    path = tmp_path / "config.yaml"
    path.write_text("{input: {path: s3://a/b}, output: s3://a/c, model: {path: gpt2}}")
    result = CliRunner().invoke(
        app, ["submit", str(path), "--address", "http://127.0.0.1:9", *options]
    )
    assert result.exit_code == errors.EXIT_REFUSED
    assert message in result.stderr
    assert "abc" not in result.stderr
    assert "word" not in result.stderr


@pytest.mark.parametrize(
    "name",
    ["ACCESSKEY", "SASTOKEN", "GITHUB_TOKENS", "HF_TOKEN_2", "TOKEN_HF", "openai_key_prod",
     "SIGNING_KEY_PEM", "KEY_PASSPHRASE", "HTTP_AUTH_HEADER", "AUTHTOKEN", "DB_PASS",
     "AUTHORIZATION", "HFTOKEN_PROD", "AWS_CREDS", "MYSQL_PWD", "GITHUB_PAT"],
)  # fmt: skip
def test_what_may_be_a_secret_is_not_sent(name: str) -> None:
    with pytest.raises(errors.ConfigError, match="it looks like a secret"):
        submitting._parse_variables([f"{name}=x"])


def test_what_only_sounds_like_a_secret_is_sent() -> None:
    pairs = [
        "TOKENIZERS_PARALLELISM=x", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/t", "AUTHOR=x",
        "MAX_TOKENS=8192", "SORT_BY_KEY=true",
    ]  # fmt: skip
    assert len(submitting._parse_variables(pairs)) == len(pairs)


def test_a_cluster_that_has_just_come_up_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses jobs until an agent is there, with these words; what else it refuses, it does."""
    monkeypatch.setattr(submitting, "BACKOFF_S", (0.0, 0.0))
    refusals = ["No available agent to submit job, please try again later."]

    class Client:
        def list_jobs(self) -> list[Any]:
            return []

        def get_address(self) -> str:
            return "http://head:8265"

        def submit_job(self, **_: Any) -> None:
            if refusals:
                raise RuntimeError(refusals.pop())

    client: Any = Client()
    assert submitting._start(client, "run", "python", "0" * 16, {}).started
    refusals += ["no such image"]
    with pytest.raises(errors.ConfigError, match="the job was refused: no such image"):
        submitting._start(client, "run", "python", "0" * 16, {})
    refusals += ["try again later"] * 4
    with pytest.raises(errors.ConfigError, match="try again later"):
        submitting._start(client, "run", "python", "0" * 16, {})


def test_extras_travel_in_the_versions_that_are_here() -> None:
    [pin] = submitting._pins("gguf")
    assert re.fullmatch(r"gguf==\d[\d.]*", pin)


@given(st.data())
def test_a_log_that_is_read_again_is_said_once(data: st.DataObject) -> None:
    said: list[str] = []
    lines = _Lines(said.append)
    log = 'one\n{"step": 1}\ntwo\n{"rows": 1}\n{not json\nlast'
    for _ in range(data.draw(st.integers(0, 3))):
        lines.again()
        cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=4)))
        for start, end in zip([0, *cuts], cuts, strict=False):
            lines.take(log[start:end])
    lines.take_all(log)
    assert said == ["one", "two", '{"step": 1}', "{not json", "last"]
    assert lines.end() == {"rows": 1}
