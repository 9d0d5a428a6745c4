"""`cherry plan`: what a run would score, before it does."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, write_parquet
from faults import make_rows
from typer.testing import CliRunner

from pipeline import estimate, run
from pipeline.cli import app
from pipeline.errors import InputError
from pipeline.job import check, plan
from pipeline.tokenising import tokenise

pytestmark = pytest.mark.ray
ConfigFor = Callable[..., Any]
SHARED = REPOSITORY.parent / "shared"


def test_of_a_small_corpus_it_is_what_a_run_scores(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    config = config_for(corpus)
    before = run.estimate(config, 0)
    summary = run.score(config).summary
    assert before.tokens == summary.tokens_scored
    assert before.tokens_error == 0.0
    assert before.rows_by_status == summary.rows_by_status
    assert (before.rows, before.rows_done, before.units_done) == (summary.rows, 0, 0)
    after = run.estimate(config, 0)
    assert (after.rows_done, after.units_done) == (summary.rows, summary.units_total)
    assert (after.tokens, after.rows_by_status, after.sampled_rows) == (0, {}, 0)


def test_what_a_run_skips_is_skipped(ray_local: None, config_for: ConfigFor, corpus: Path) -> None:
    bad = corpus / "shard-8.parquet"
    write_parquet(bad, [{"instruction": "a", "output": f"{n} " * 50} for n in range(20)])
    data = bytearray(bad.read_bytes())
    data[4:80] = bytes(76)  # the footer is sound
    bad.write_bytes(data)
    (corpus / "shard-9.parquet").write_bytes(b"no footer")
    config = config_for(corpus, input={"on_bad_shard": "skip"})
    found = run.estimate(config, 0)
    summary = run.score(config).summary
    assert found.skipped_shards == len(summary.skipped_shards) == 2
    assert (found.rows, found.tokens) == (summary.rows, summary.tokens_scored)
    bad.unlink()
    with pytest.raises(InputError, match="shard-9"):
        run.estimate(config_for(corpus), 0)


def test_only_what_is_new_is_estimated(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    config = config_for(corpus)
    first = run.score(config).summary
    shard = sorted(corpus.iterdir())[0]
    old = pq.read_table(shard).to_pylist()
    new = [{**old[0], "instruction": f"A new line {n}."} for n in range(2)]
    write_parquet(shard, [*old, *new])  # a shard that was appended to
    write_parquet(corpus / "shard-9.parquet", [{**old[0], "instruction": "Another shard."}])
    found = run.estimate(config, 0)
    again = run.score(config).summary
    assert found.tokens == again.tokens_scored
    assert found.rows_reusable == len(old)
    assert found.rows == first.rows + 3
    units = config_for(corpus, score={"reuse": "units"}, output=config.output)
    assert run.estimate(units, 0).tokens == 0  # by now all of it is done


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    """6,000 rows in three shards; the rows grow longer towards the end, as sorted corpora do."""
    rows = sorted(make_rows(6_000, seed=3), key=lambda row: len(row["output"]))
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_parquet(tmp_path / f"in/{number}.parquet", rows[2000 * number : 2000 * number + 2000])
    return tmp_path / "in"


def test_a_sample_tells_the_tokens_of_a_sorted_corpus(
    ray_local: None, config_for: ConfigFor, many_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_MOST_LENGTHS", 2_000)
    monkeypatch.setattr(estimate, "_BLOCK_ROWS", 20)
    monkeypatch.setattr(estimate, "_MOST_TOKENISED", 200)
    config = config_for(many_rows)
    found = run.estimate(config, 0)
    job = plan(check(config, selecting=False))
    monkeypatch.setattr(estimate, "_MOST_LENGTHS", 6_000)  # all of them
    samples, unreadable = estimate._read(job, job.plan.units)
    assert (len(samples), unreadable) == (6_000, [])
    table = tokenise(np.arange(6_000), samples, job.settings)
    prefix = len(estimate.renderer(job.settings).prefix_ids)
    true = int(estimate._num_tokens(table, prefix).sum())
    assert found.sampled_rows == 200
    assert found.tokens == pytest.approx(true, rel=0.02)
    assert 0 < found.tokens_error < 0.02


def test_rows_are_drawn_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_MOST_LENGTHS", 40)
    monkeypatch.setattr(estimate, "_BLOCK_ROWS", 10)
    assert estimate._drawn(40).tolist() == list(range(40))
    drawn = estimate._drawn(1_000)
    assert drawn.tolist() == [start + n for start in (0, 330, 660, 990) for n in range(10)]
    assert len(np.unique(estimate._drawn(41))) == len(estimate._drawn(41))


def test_the_regression_is_exact_where_tokens_follow_characters() -> None:
    source = random.Random(5)
    chars = np.array([source.randrange(1, 900) for _ in range(1_000)])
    some = chars[::50]
    total, error = estimate._total(30 + 2 * some, some, chars, 10_000)
    assert total == round(10_000 * (30 + 2 * chars.mean()))
    assert error == pytest.approx(10_000 * 2 * some.std() * np.sqrt(0.9 / 1_000))
    assert estimate._total(np.array([7, 7]), np.array([3, 3]), np.array([3, 3]), 2) == (14, 0.0)


def test_scoring_some_rows_tells_speed_and_cost(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    config = config_for(corpus, cluster={"price_per_gpu_hour": 3.6})
    found = run.estimate(config, 8)
    assert found.scored_rows == 8
    assert found.seconds_per_million_tokens is not None
    assert found.seconds_per_million_tokens > 0
    hours = found.tokens * found.seconds_per_million_tokens / 1e6 / 3600
    assert found.model_hours == pytest.approx(hours)
    assert found.cost == pytest.approx(3.6 * hours)
    assert 0.0 <= (found.over_one_fraction or 0.0) <= 1.0
    assert not list(Path(config.output).glob("scores/*/*"))


def test_the_command_prints_it(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(config_for(corpus).model_dump_json(exclude={"cluster": {"price_per_gpu_hour"}}))
    done = CliRunner().invoke(app, ["plan", str(path), "--json", "--score", "4"])
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["scored_rows"] == 4
    assert f"about {summary['tokens_conditioned'] + summary['tokens_direct']:,}" in done.stderr
    assert "actors" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the team's folder of corpora")
def test_alpaca_within_two_percent_in_half_a_minute(ray_local: None, config_for: ConfigFor) -> None:
    config = config_for(
        SHARED / "data/alpaca_en_52k.parquet",
        model={"path": str(SHARED / "models/stories260k"), "dtype": "bfloat16"},
    )
    begun = time.monotonic()
    found = run.estimate(config, 0)
    seconds = time.monotonic() - begun
    assert found.tokens == pytest.approx(24_353_681, rel=0.02)  # as a whole run counted
    assert found.rows_by_status["ok"] == pytest.approx(51_905, abs=100)
    assert seconds < 300  # 30 on a machine that does nothing else
