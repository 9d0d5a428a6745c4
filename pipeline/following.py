"""A job of a Ray cluster, followed to its end: its log, once, its exit code and its summary."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from pipeline.errors import EXIT_FAILED, ClusterError
from pipeline.submitting import BACKOFF_S, Submitted
from pipeline.texts import describe_cause

T = TypeVar("T")

_POLL_S = 0.5


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    exit_code: int
    """Its own, or 1 where it has none."""
    summary: dict[str, Any] | None
    """What it printed as JSON in the end."""
    message: str
    """The same in words."""


def follow(job: Submitted, say: Callable[[str], None]) -> Ended:
    """Pass on each line of a job's log until it ends; a KeyboardInterrupt leaves the job alone.

    The JSON object that it prints in the end is not passed on: it is the summary.

    Raises:
        ClusterError: The cluster does not answer any more.
    """
    lines = _Lines(say)
    while not (details := _insist(job, _look)).status.is_terminal():
        _insist(job, lambda j: asyncio.run(_tail(j, lines)))
    # A connection that was closed on the way may have taken the end of the log with it.
    lines.take_all(_insist(job, lambda j: j.client.get_job_logs(j.submission_id)))
    code = 0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code
    if code is None:  # it never began, or was stopped
        return Ended(EXIT_FAILED, lines.end(), details.message or details.status.value)
    return Ended(code, lines.end(), f"it ended with exit code {code}; its log says why")


def stop(job: Submitted) -> None:
    """Tell a job to stop, and wait until it has; its finished units are kept.

    Raises:
        ClusterError: The cluster does not answer any more.
    """
    _insist(job, lambda j: j.client.stop_job(j.submission_id))
    while not _insist(job, _look).status.is_terminal():
        time.sleep(_POLL_S)


def _look(job: Submitted) -> JobDetails:
    return job.client.get_job_info(job.submission_id)


async def _tail(job: Submitted, lines: "_Lines") -> None:
    lines.again()
    async for text in job.client.tail_job_logs(job.submission_id):
        lines.take(text)
    await asyncio.sleep(_POLL_S)  # the status follows the end of the log


def _insist(job: Submitted, ask: Callable[[Submitted], T]) -> T:
    """Ask a cluster until it answers: its head, or a connection, may be away for a while."""
    failures = 0
    while True:
        begun = time.monotonic()
        try:
            return ask(job)
        except (RuntimeError, OSError, aiohttp.ClientError) as err:  # requests' are OSErrors
            if _cancelled(err):
                raise KeyboardInterrupt from None
            if time.monotonic() - begun > BACKOFF_S[-1]:
                failures = 0  # it had answered in between
            if failures == len(BACKOFF_S):
                raise ClusterError(
                    f"{job.address}: the cluster does not answer after {failures + 1} tries: "
                    f"{describe_cause(err)} The job {job.submission_id} may still run; the same "
                    "command finds it, and goes on with what is scored if it does not."
                ) from err
            time.sleep(BACKOFF_S[failures] * random.uniform(0.5, 1.0))
            failures += 1


def _cancelled(err: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: a connection that is given up may fail to be closed."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, asyncio.CancelledError):
            return True
        cause = cause.__context__
    return False


class _Lines:
    """A log that is read again from its start after each interruption, line by line, once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._seen = self._position = 0
        self._rest = ""
        self._summary = ""

    def again(self) -> None:
        """What comes next is the log from its start."""
        self._position = 0

    def take(self, text: str) -> None:
        """The log goes on with `text`."""
        *whole, self._rest = (self._rest + text[max(0, self._seen - self._position) :]).split("\n")
        self._position += len(text)
        self._seen = max(self._seen, self._position)
        for line in whole:
            self._take_line(line)

    def take_all(self, text: str) -> None:
        """The log is `text`, and ends there."""
        self.again()
        self.take(text)
        self._take_line(self._rest)

    def end(self) -> dict[str, Any] | None:
        """The last line that was a JSON object."""
        return json.loads(self._summary) if self._summary else None

    def _take_line(self, line: str) -> None:
        if line.startswith("{") and _is_json(line):
            line, self._summary = self._summary, line  # the one before was of something else
        if line:
            self._say(line)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
