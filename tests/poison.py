"""A hook in every Ray worker that makes chosen rows deadly, as a broken kernel or tokenizer would.

``CHERRY_POISON`` maps sample ids (hex) to what happens when the row is scored or, for kinds that
begin with ``tokenise-``, rendered: raise, sticky, exit, kill, hang, memory. ``load`` as a key makes
every model deadly to load.
"""

import json
import os
import resource
import signal
import threading
from typing import Any

from on_import import OnImport

POISON = json.loads(os.environ.get("CHERRY_POISON", "{}"))


class PoisonError(RuntimeError):
    """What a poisonous row raises."""


def job_config(hook: str = "poison.install") -> str:
    """For RAY_JOB_CONFIG_JSON_ENV_VAR, which `ray job submit` sets too."""
    return json.dumps({"runtime_env": {"worker_process_setup_hook": hook}})


def install() -> None:
    """Wrap what scores and what renders; Ray calls this in each new worker process."""
    OnImport(
        {
            "pipeline.models": _poison_load,
            "pipeline.tokenising": _poison_renderer,
            "pipeline.scoring": _poison_score_table,
        }
    )


def _poison_load(models: Any) -> None:
    load = models.load

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        take_effect(POISON.get("load", ""))
        return load(*args, **kwargs)

    models.load = poisoned


def _poison_renderer(tokenising: Any) -> None:
    renderer = tokenising.renderer

    def poisoned(settings: Any, **options: Any) -> Any:
        inner = renderer(settings, **options)

        def render(samples: Any) -> Any:
            from pipeline.samples import sample_id

            for sample in samples:
                kind = POISON.get(sample_id(sample.messages).hex(), "")
                if kind.startswith("tokenise-"):
                    take_effect(kind.removeprefix("tokenise-"))
            return inner(samples)

        render.prefix_ids = inner.prefix_ids  # type: ignore[attr-defined]
        return render

    tokenising.renderer = poisoned


def _poison_score_table(scoring: Any) -> None:
    score_table = scoring.score_table

    def poisoned(tokens: Any, *rest: Any) -> Any:
        for row_id in tokens["sample_id"].to_pylist():
            take_effect(POISON.get(row_id.hex() if row_id else None, ""))
        return score_table(tokens, *rest)

    scoring.score_table = poisoned


broken = threading.Event()


def take_effect(kind: str) -> None:
    """Do what a kind of poison does to the process it is in."""
    if kind == "sticky":  # as an assertion in a GPU's kernel: nothing works any more
        broken.set()
    if kind == "raise" or broken.is_set():
        raise PoisonError("it does not like this row")
    if kind == "exit":
        os._exit(3)
    if kind == "kill":  # as the system's memory killer does
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        threading.Event().wait()
    if kind == "memory":
        _exhaust_own_limit()


def _exhaust_own_limit() -> None:
    """Allocate more than this process may have, which is far less than the machine has."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
    try:
        bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
