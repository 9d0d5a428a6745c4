"""Rows that raise, kill, hang or exhaust memory cost themselves only; dead models end the run."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from conftest import REPOSITORY, ROWS, read_parts, write_parquet
from poison import PoisonError, job_config
from ray.exceptions import RayError

from pipeline import listing, recovery, run, scoring, tokenising
from pipeline.errors import InputError, ScoringError
from pipeline.layouts import Columns
from pipeline.parts import commit_unit, publish_part
from pipeline.samples import Message, sample_id
from pipeline.schemas import PART, TOKENS, from_ipc, hand_on
from pipeline.scoring import UnitScorer
from pipeline.units import Unit

pytestmark = pytest.mark.ray
ConfigFor = Callable[..., Any]

DEADLY = {  # row: what it does
    4: "raise",
    12: "sticky",
    17: "hang",
    20: "memory",
    38: "kill",
}
REASONS = {
    "kill": "ProcessDied: the row takes its process with it",
    "tokenise-exit": "ProcessDied: the row takes its process with it",
    "raise": "PoisonError",
    "sticky": "PoisonError",
    "memory": "MemoryError",
    "hang": "TimeoutError: not scored within 1 s",
}


def id_of(row: dict[str, Any]) -> str:
    roles = [("user", "instruction"), ("input", "input"), ("assistant", "output")]
    return sample_id(tuple(Message(r, row[c]) for r, c in roles if row[c])).hex()  # type: ignore[arg-type]


def cherry(
    config: Any, *arguments: str, poison: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """A run in its own process on its own cluster, with poison in the rows."""
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = {
        **os.environ,
        "RAY_ADDRESS": "local",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": job_config(),
        "CHERRY_POISON": json.dumps(poison),
        "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    }
    return subprocess.run(
        [sys.executable, "-m", "pipeline", arguments[0], str(path), *arguments[1:], "--json"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip


def statuses(scores_path: str) -> list[tuple[str, str | None]]:
    parts = read_parts(scores_path)
    return list(zip(parts["status"].to_pylist(), parts["reason"].to_pylist(), strict=True))


def scores(scores_path: str) -> list[tuple[Any, ...]]:
    names = ["num_response_tokens", "nll_conditioned", "nll_direct", "ifd_loss_ratio"]
    return [tuple(row.values()) for row in read_parts(scores_path).select(names).to_pylist()]


@pytest.mark.slow
@pytest.mark.timeout(3000)  # many processes begin one after the other
def test_deadly_rows_end_as_errors_and_all_others_are_scored(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "corpus" / "all.parquet", ROWS)
    config = config_for(
        tmp_path / "corpus",
        score={"unit_rows": 10, "unit_timeout_s": 10, "max_error_fraction": 0.2},
        cluster={"actors": 1},
    )
    poison = {id_of(ROWS[index]): kind for index, kind in DEADLY.items()}
    done = cherry(config, "run", poison=poison)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows_by_status"] == {"error": len(DEADLY), "ok": len(ROWS) - len(DEADLY)}
    found = statuses(summary["scores_path"])
    for index, (status, reason) in enumerate(found):
        expected = ("error", REASONS[DEADLY[index]]) if index in DEADLY else ("ok", None)
        assert (index, status, reason) == (index, *expected)
    assert done.stderr.count("lost with a process") >= 2

    # Nothing is tried again unless asked: a part that exists is a unit that is done.
    again = json.loads(cherry(config, "run", poison={}).stdout)
    assert again["units_scored"] == 0
    # Without the cause the same rows get their scores, and only they are paid for.
    retried = json.loads(cherry(config, "run", "--retry-errors", poison={}).stdout)
    assert retried["rows_by_status"] == {"ok": len(ROWS)}
    assert retried["rows_reused"] == len(ROWS) - len(DEADLY)
    assert retried["manifest"] != summary["manifest"]
    clean = run.run(config.model_copy(update={"output": str(tmp_path / "clean")})).summary
    assert retried["tokens_scored"] < clean.tokens_scored / 3
    for row, expected_row in zip(
        scores(retried["scores_path"]), scores(clean.scores_path), strict=True
    ):
        assert row == pytest.approx(expected_row, rel=1e-5)


@pytest.mark.slow
def test_units_that_were_read_with_a_deadly_row_are_scored(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    """One sweep over a large row group reads several units: the process may die in between."""
    write_parquet(tmp_path / "corpus" / "all.parquet", ROWS)
    config = config_for(tmp_path / "corpus", score={"unit_rows": 1}, cluster={"actors": 1})
    together = run.score(config).summary
    alone = config_for(tmp_path / "corpus", score={"unit_rows": 40}, output=str(tmp_path / "alone"))
    expected = scores(run.score(alone).summary.scores_path)
    found = scores(together.scores_path)
    assert len(found) == len(ROWS)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    config = config.model_copy(update={"output": str(tmp_path / "deadly")})
    poison = {id_of(ROWS[11]): "tokenise-exit"}
    done = cherry(config, "score", "--set=score.max_error_fraction=0.1", poison=poison)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows_by_status"] == {"error": 1, "ok": len(ROWS) - 1}
    assert statuses(summary["scores_path"])[11] == ("error", REASONS["tokenise-exit"])
    first, second = re.findall(r"lost with a process, and tried again: (\d+) unit", done.stderr)
    assert 2 <= int(first) <= 5  # of five that are read together
    assert second == "1"
    assert re.findall(r"lost twice, .*: (\d+) unit", done.stderr) == ["1"]


def test_a_unit_that_cannot_be_prepared_costs_the_others_of_its_read_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "shard.parquet", ROWS)
    (file,) = listing.list_objects(str(tmp_path / "shard.parquet"))
    columns = Columns("alpaca", {"instruction": "instruction", "response": "output"})
    units = [
        Unit(f"{n}", file.url, file.url, columns, n, n + 8, "fp", "fp", file.size, file.version)
        for n in range(0, 40, 8)
    ]
    known: dict[str, Exception] = {"8": InputError("no"), "16": ValueError("never seen")}

    def prepare(unit: Unit, _: Any, tables: Any) -> tuple[pa.Table, pa.Table]:
        if unit.unit_id == "8":
            raise known["8"]  # before its rows are read; after them
        samples = tokenising.read(unit, tables)
        if unit.unit_id == "16":
            raise known["16"]
        return pa.table({"said": [s.messages[0].content for s in samples]}), PART.empty_table()

    monkeypatch.setattr(tokenising, "prepare", prepare)
    batch = pa.table({"units": [[unit.to_json() for unit in units]]})
    scoring: Any = SimpleNamespace(timeout_s=60)
    rows = [table.to_pylist()[0] for table in tokenising.tokenise_units(batch, scoring)]
    assert [Unit.from_json(row["unit"]) for row in rows] == units
    assert [row["failure_kind"] for row in rows] == [
        None, "InputError", "LostUnitError", None, None
    ]  # fmt: skip
    for row, unit in zip(rows, units, strict=True):
        if row["failure"] is None:
            said = from_ipc(pa.py_buffer(row["tokens"]))["said"].to_pylist()
            assert said == [r["instruction"] for r in ROWS[unit.start : unit.stop]]


def test_a_model_that_dies_while_it_loads_ends_the_run(config_for: ConfigFor, corpus: Path) -> None:
    done = cherry(config_for(corpus), "score", poison={"load": "exit"})
    assert done.returncode == 1
    assert "no process could be started" in done.stderr
    assert "Started a local Ray" not in done.stderr  # by a thread that outlived the run
    assert not list(Path(config_for(corpus).output).glob("scores/*/*.parquet"))


def test_an_isolated_unit_has_the_schema_of_any_part(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    from pipeline import cluster
    from pipeline.job import check, plan
    from pipeline.settings import Scoring

    config = config_for(corpus, score={"unit_rows": 15})
    job = plan(check(config, selecting=False))
    scoring = Scoring(
        job.settings, job.plan.scores_url, cluster.plan_workers(config.cluster), timeout_s=300
    )
    done = list(recovery._isolate(list(job.plan.units), scoring))
    assert sum(unit.rows for unit in done) == len(ROWS)
    isolated = read_parts(job.plan.scores_url)
    for path in Path(job.plan.scores_url).glob("*.parquet"):
        assert pq.read_schema(path).remove_metadata().equals(plain_part_schema())
    whole = run.score(config.model_copy(update={"output": config.output + "-whole"})).summary
    for name in ("row_index", "sample_id", "status", "num_response_tokens"):
        assert isolated[name].to_pylist() == read_parts(whole.scores_path)[name].to_pylist()
    for row, expected in zip(scores(job.plan.scores_url), scores(whole.scores_path), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def plain_part_schema() -> pa.Schema:
    from pipeline.schemas import PART

    return PART


def test_a_unit_that_raises_is_lost_and_costs_no_process() -> None:
    """However many raise: only processes that die count against what a pass may lose."""

    class Raises(UnitScorer):
        def score(self, *_: Any) -> Any:
            raise PoisonError("it does not like this row")

    unit = Unit("u", "shard", "shard", Columns("alpaca", {}), 0, 1, "fp", "fp").to_json()
    scorer = object.__new__(Raises)
    out = scorer(hand_on(unit, TOKENS.empty_table(), PART.empty_table()))
    assert out["failure_kind"].to_pylist() == ["LostUnitError"]
    assert out["failure"].to_pylist() == ["PoisonError"]
    done = commit_unit(out, "nowhere", False)
    assert done["failure_kind"].to_pylist() == ["LostUnitError"]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_part_whose_answer_was_lost_is_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    """Its node died between the commit and the driver: the part is there, and that is enough."""
    columns = Columns("alpaca", {})
    units = [Unit(name, "s", "s", columns, 0, 2, "fp", "fp") for name in ("told", "lost", "gone")]
    settings: Any = SimpleNamespace(scores_url=str(tmp_path), rescore=False)
    rows = [{"row_index": n, "status": "ok", "ifd_loss_ratio": 0.5 + n} for n in range(2)]
    part = pa.Table.from_pylist(rows, schema=PART)
    offered = []

    def lossy(some: list[Unit], settings: Any, *, alone: bool) -> Iterator[Any]:
        assert alone == (len(offered) == 1 and not breaks)  # what was lost is read alone
        offered.append([unit.unit_id for unit in some])
        for unit in some:
            if unit.unit_id == "gone" and len(offered) == 1:
                continue
            done = publish_part(
                unit, part, settings.scores_url, False, num_tokens=7, rows_reused=0, started=1.0
            )
            if unit.unit_id != "lost":
                yield done
        if breaks and len(offered) == 1:
            raise RayError("a node is gone")

    monkeypatch.setattr(scoring, "score_pass", lossy)
    done = {unit.unit_id: unit for unit in recovery.score_units(units, settings)}
    assert offered == [["told", "lost", "gone"], ["gone"]]
    assert done.keys() == {"told", "lost", "gone"}
    assert (done["lost"].rows_by_status, done["lost"].over_one) == ({"ok": 2}, 1)
    assert (done["lost"].tokens, done["told"].tokens) == (0, 7)


def test_a_pass_without_progress_ends() -> None:
    def rows() -> Iterator[int]:
        yield 1
        threading.Event().wait()

    within = scoring._within(rows(), seconds=0.2)
    assert next(within) == 1
    with pytest.raises(ScoringError, match="no unit was finished for 0 s"):
        next(within)


def test_what_a_pass_raises_is_raised_where_its_rows_are_awaited() -> None:
    def rows() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    within = scoring._within(rows(), seconds=60)
    assert next(within) == 1
    with pytest.raises(KeyError):
        next(within)


def test_a_closed_ward_ends_its_processes_and_admits_no_more(ray_local: None) -> None:
    @ray.remote
    class Patient:
        def wait(self) -> None:
            threading.Event().wait()

    ward = recovery._Ward()
    actor = ward.admit(Patient.remote)
    waiting = actor.wait.remote()
    ward.close()
    with pytest.raises(RayError):
        ray.get(waiting, timeout=60)
    with pytest.raises(ScoringError, match="the run has ended"):
        ward.admit(Patient.remote)
