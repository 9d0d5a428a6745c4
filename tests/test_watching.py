"""How far a run is: the numbers, how they look, and Prometheus and Grafana."""

import io
import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from faults_cluster import wait_until
from ray.util import metrics
from rich.console import Console

from pipeline import run
from pipeline.parts import UnitDone
from pipeline.progress import RunProgress
from pipeline.training_loop import StepDone
from pipeline.watching import Pace, TrainingMetrics, _PaceMetrics

STEP = StepDone(step=2, num_steps=12, loss=1.25, grad_norm=1.0, tokens=3000, seconds=1.5)


def unit(started: float, tokens: int = 900, **statuses: int) -> UnitDone:
    """A unit of ten rows that took five seconds."""
    counts = statuses or {"ok": 10}
    return UnitDone(
        unit_id="u", shard_url="s", rows=sum(counts.values()), rows_by_status=counts,
        rows_reused=0 if tokens else 10, tokens=tokens, started=started, committed=started + 5,
        over_one=0, failure=None, failure_kind=None,
    )  # fmt: skip


def pace_of(*units: UnitDone, total: int = 8, price: float | None = 3.0) -> Pace:
    pace = Pace("scoring", total, price)
    for each in units:
        pace.add(each)
    return pace


def test_a_pace_is_of_the_units_that_were_scored() -> None:
    pace = pace_of(unit(100.0), unit(102.0, ok=7, error=3), unit(50.0, tokens=0), unit(105.0))
    assert (pace.done, pace.rows, pace.errors, pace.tokens) == (4, 40, 3, 2700)
    assert pace.elapsed_s == 10.0  # not from the reused unit on
    assert pace.tokens_per_s == 270.0
    assert pace.seconds_left == pytest.approx(4 * 10 / 3)
    assert pace.dollars == pytest.approx(10 * 3 / 3600)


def test_nothing_is_said_of_what_is_not_known() -> None:
    pace = pace_of(unit(50.0, tokens=0), price=None)
    assert (pace.tokens_per_s, pace.seconds_left, pace.dollars) == (0.0, None, None)


def said(*paces: Pace, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None)
    with RunProgress(console) as progress:
        progress.phase("scoring")
        for pace in paces:
            progress.unit(pace)
        if not paces:
            progress.step(STEP)
    return out.getvalue()


def test_a_log_has_plain_lines() -> None:
    pace = pace_of(unit(100.0, ok=9, error=1), total=1)
    line = "scoring: 1 of 1 units, 10 rows, 1 error, 180 tokens/s, $0.00\n"
    assert said(pace, terminal=False) == line


def test_a_log_has_a_line_for_each_however_narrow_it_is() -> None:
    pace = pace_of(unit(100.0, ok=10**15, error=10**15), total=1)
    assert len(said(pace, terminal=False)) > 80
    assert said(pace, terminal=False).count("\n") == 1


def test_a_terminal_of_80_columns_shows_all_of_it() -> None:
    pace = pace_of(
        *[unit(1e6 + n, tokens=60_000, ok=99_999, error=1) for n in range(999)], total=2000
    )
    shown = said(pace, terminal=True)
    for part in (
        "999/2000 units",
        "99,900,000 rows",
        "999 errors",
        "tokens/s",
        "$0.84",
        "0:16:45 left",
    ):
        assert part in shown, shown
    assert "…" not in shown
    steps = said(terminal=True)
    assert "2/12 steps" in steps
    assert "loss 1.250, 2,000 tokens/s, 0:00:15 left" in steps


@pytest.mark.ray
def test_prometheus_sees_a_run(
    ray_local: None, config_for: Callable[..., Any], corpus: Path
) -> None:
    import ray

    config = config_for(corpus, cluster={"actors": 1, "price_per_gpu_hour": 2.0})
    summary = run.score(config).summary
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def exported() -> dict[str, float]:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        pattern = r"^ray_(cherry_\w+)\{(.*)\} (\S+)$"
        lines = [m for m in re.findall(pattern, text, re.MULTILINE) if 'phase="scoring"' in m[1]]
        found = {}
        for name, tags, value in lines:
            status = re.search(r'status="(\w+)"', tags)
            found[f"{name}.{status[1]}" if status else name] = float(value)
        return found

    wait_until(lambda: exported().get("cherry_units_done") == summary.units_total, "the metrics")
    found = exported()
    assert found["cherry_units_planned"] == summary.units_total
    assert found["cherry_rows_total.ok"] >= summary.rows_by_status["ok"]  # of all runs of this Ray
    assert found["cherry_tokens_total"] >= summary.tokens_scored
    assert found["cherry_tokens_per_s"] > 0
    assert found["cherry_dollars"] > 0
    assert found["cherry_seconds_left"] == 0


def test_grafana_shows_what_exists() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    ours = [*vars(_PaceMetrics("scoring")).values(), *vars(TrainingMetrics()).values()]
    exist = {f"ray_{name}" for name in METRICS_GAUGES}
    for metric in ours:
        total = "_total" if isinstance(metric, metrics.Counter) else ""
        exist.add(f"ray_{metric.info['name']}{total}")
    dashboard = json.loads((REPOSITORY / "cluster/grafana.json").read_text())
    named = set(re.findall(r"\bray_\w+", json.dumps(dashboard)))
    assert named <= exist
    assert {name for name in exist if "cherry" in name} <= named  # and all of ours
