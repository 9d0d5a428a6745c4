"""`cherry submit`: a command as a job of a Ray cluster, followed to its end.

Ray keeps a job's entrypoint, metadata and environment variables in a record that everyone who
reaches the cluster can read. So no secret travels: what looks like one is refused, and the cluster
brings its own. The config travels in the job's working directory, and with it this package, unless
the cluster has it installed.
"""

import itertools
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from pipeline import __version__
from pipeline.config import Config, load
from pipeline.config_faults import carries_credentials
from pipeline.errors import ConfigError
from pipeline.texts import describe_cause
from pipeline.units import fingerprint

_SCORING = ("run", "score", "experience")
"""Commands that know `--retry-errors`."""

_SECRET = re.compile(
    r"KEY|SECRET|TOKEN(?!I[SZ])|PASS(W|PHRASE|$)|_PWD$|_PAT$|CREDENTIAL|CREDS|CONNECTION_STRING"
    r"|AUTH(?!ORS?(_|$))",
    re.IGNORECASE,
)
"""Names of what may be a secret: when in doubt it is one, as a refusal costs a line."""
_HARMLESS_NAME = re.compile(r"_(MODE|TYPE|FILE|PATH|DIR|URL)$", re.IGNORECASE)
_HARMLESS_VALUE = re.compile(r"\d{1,6}|true|false", re.IGNORECASE)

_DISTRIBUTION = "cherry-pipeline"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
BACKOFF_S = (1, 2, 4, 8, 16, 30)
"""Seconds between tries while a cluster does not answer: its head may be on its way."""


@dataclass(frozen=True)
class Submitted:
    """A job that is on its cluster."""

    client: JobSubmissionClient
    submission_id: str
    started: bool
    """False if the same job was running already, and nothing was started."""

    @property
    def address(self) -> str:
        """Of the cluster's dashboard."""
        return self.client.get_address()


def submit(
    path: str,
    overrides: list[str] | None,
    address: str | None,
    *,
    command: str = "run",
    retry_errors: bool = False,
    variables: list[str] | None = None,
    extras: list[str] | None = None,
    installed: bool = False,
) -> Submitted:
    """Start a command as a job, unless the same one is running.

    Args:
        path: Of the config, here.
        overrides: `a.b=value`, over the config.
        address: Of the cluster: `http://host:8265`; None is RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
        command: Of `cherry`.
        retry_errors: Rows with status error once more, where the command scores.
        variables: `NAME=value` for the job's environment.
        extras: Of this package, installed by pip in the versions that are here.
        installed: The cluster has this package; else it travels.

    Raises:
        ConfigError: The config is wrong, something in it cannot be reached from elsewhere, a
            variable looks like a secret, or the cluster does not answer. Nothing was started.
    """
    settings = load(path, overrides)
    _check_reachable(settings)
    if retry_errors and command not in _SCORING:
        raise ConfigError(
            f"--retry-errors: cherry {command} scores nothing, expected --command "
            f"{', '.join(_SCORING[:-1])} or {_SCORING[-1]}. Leave it out."
        )
    runtime_env: dict[str, Any] = {"env_vars": _parse_variables(variables or [])}
    if extras:
        runtime_env["pip"] = [pin for extra in extras for pin in _pins(extra)]
    arguments = [f"--set={override}" for override in overrides or []]
    arguments += ["--json"] + ["--retry-errors"] * retry_errors
    entrypoint = shlex.join(["python", "-m", "pipeline", command, "config.yaml", *arguments])
    same = fingerprint({"config": settings.model_dump(mode="json"), "entrypoint": entrypoint})
    client = _connect(address)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, os.path.join(folder, "config.yaml"))
        if not installed:
            shutil.copytree(
                Path(__file__).parent, os.path.join(folder, "pipeline"),
                ignore=shutil.ignore_patterns("__pycache__"),
            )  # fmt: skip
        return _start(client, command, entrypoint, same, runtime_env | {"working_dir": folder})


def _check_reachable(config: Config) -> None:
    """A path that only means something in this directory is refused."""
    named = {"input.path": config.input.paths, "output": [config.output]}
    model = config.model.path
    if model.endswith(".gguf") or os.path.exists(model):  # else a name on the hub
        named["model.path"] = [model]
    if config.compare:
        named["compare.evaluate"] = [held_out.path for held_out in config.compare.evaluate]
    for key, paths in named.items():
        for path in paths:
            if "://" not in path and not os.path.isabs(path):
                raise ConfigError(
                    f"key '{key}': got the relative path {path!r}, and the job runs elsewhere. "
                    "Expected a URL, or an absolute path that every node of the cluster sees."
                )


def _parse_variables(pairs: list[str]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ConfigError(f"--env {name}: expected NAME=value.")
        harmless = _HARMLESS_NAME.search(name) or _HARMLESS_VALUE.fullmatch(value)
        if (_SECRET.search(name) and not harmless) or carries_credentials(value):
            raise ConfigError(
                f"--env {name}: it looks like a secret, and Ray shows the environment of a job to "
                "everyone who reaches the cluster. Nothing was sent. Give it to the nodes instead: "
                "a secretRef in the pod (cluster/), an instance profile or workload identity."
            )
        variables[name] = value
    return variables


def _pins(extra: str) -> list[str]:
    """The requirements of an extra, in the versions that are here."""
    found = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or []]
    wanted = [r for r in found if r.marker and r.marker.evaluate({"extra": extra})]
    if not any("extra ==" in str(r.marker) for r in wanted):
        known = sorted(metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or [])
        raise ConfigError(f"--extra {extra}: no such extra, expected one of {', '.join(known)}.")
    try:
        return [f"{r.name}=={metadata.version(r.name)}" for r in wanted]
    except metadata.PackageNotFoundError as err:
        raise ConfigError(
            f"--extra {extra}: {err.name} is not installed here, and the job takes the version "
            f"that is. Run: pip install '{_DISTRIBUTION}[{extra}]'"
        ) from err


def _connect(address: str | None) -> JobSubmissionClient:
    if address and address.endswith(":8265") and "://" not in address:
        raise ConfigError(f"--address {address}: expected http://{address}. Nothing was started.")
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # or Ray prefers RAY_ADDRESS to an argument
    # These set a level of their own when they are imported.
    for name in (
        "ray",
        *(f"ray.dashboard.modules.{name}" for name in ("dashboard_sdk", "job.sdk")),
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()  # it may ask for a token
        return client
    except (OSError, RuntimeError, ValueError, RayError) as err:
        named = next((name for name in _ADDRESSES if os.environ.get(name)), None)
        where = f"{named} {os.environ[named]}" if named else "no address was given"
        raise ConfigError(
            f"{f'--address {address}' if address else where}: no Ray cluster takes jobs there: "
            f"{describe_cause(err)} Expected the address of its dashboard: --address "
            "http://HOST:8265, or RAY_API_SERVER_ADDRESS. Nothing was started."
        ) from err


def _start(
    client: JobSubmissionClient,
    command: str,
    entrypoint: str,
    same: str,
    runtime_env: dict[str, Any],
) -> Submitted:
    """Start a job, or find the one that is running: of two schedulers at once, one starts it."""
    jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    for name, job in jobs.items():
        if (job.metadata or {}).get("cherry_job") == same and not job.status.is_terminal():
            return Submitted(client, name, started=False)
    stem = f"cherry-{command}-{datetime.now(UTC):%Y%m%d}-{same[:8]}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in jobs)
    for wait_s in (*BACKOFF_S, None):
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env=runtime_env,
                metadata={"cherry_job": same, "cherry_version": __version__},
            )
        except RuntimeError as err:
            if any(job.submission_id == name for job in client.list_jobs()):
                return Submitted(client, name, started=False)  # another was first
            # What Ray says of a cluster whose head has only just come up.
            if wait_s is None or "try again later" not in str(err):
                raise ConfigError(f"{client.get_address()}: the job was refused: {err}") from err
            time.sleep(wait_s)
        else:
            break
    return Submitted(client, name, started=True)
