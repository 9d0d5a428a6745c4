"""The whole job on a local Ray: what a run promises, read from what it wrote."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import REPOSITORY, ROWS, make_tokenizer, read_parts, write_parquet
from ray.exceptions import RayTaskError

from pipeline import job, recovery, run, scoring
from pipeline.errors import InputError, ShardError, StorageError
from pipeline.schemas import PART
from pipeline.summary import failed_fraction
from pipeline.watching import Pace, Silence

pytestmark = pytest.mark.ray
ConfigFor = Callable[..., Any]

SCORES = ["nll_conditioned", "nll_direct", "ifd_loss_ratio", "ifd_ppl_ratio"]


def by_content(scores_path: str) -> dict[bytes, tuple[float, ...]]:
    """sample_id -> scores, of every scored row."""
    parts = read_parts(scores_path)
    columns = [parts[name].to_pylist() for name in SCORES]
    ids = parts["sample_id"].to_pylist()
    return {i: row for i, *row in zip(ids, *columns, strict=True) if row[0] is not None}


def objects(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_parts_hold_every_row_once_in_input_order(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    result = run.run(config_for(corpus, score={"unit_rows": 4}))
    parts = read_parts(result.summary.scores_path)
    assert len(parts) == result.summary.rows == len(ROWS)
    assert sum(result.summary.rows_by_status.values()) == len(ROWS)
    for path in Path(result.summary.scores_path).glob("*.parquet"):
        part = pq.read_table(path)
        assert part.schema.remove_metadata().equals(PART)
        unit = json.loads(part.schema.metadata[b"cherry.unit"])
        assert part["row_index"].to_pylist() == list(range(unit["start"], unit["stop"]))
        assert path.name == f"{unit['unit_id']}.parquet"


def test_a_rerun_scores_nothing_and_changes_nothing(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    config = config_for(corpus)
    first = run.run(config).summary
    before = objects(first.scores_path) | objects(str(first.cherry_path))
    again = run.run(config).summary
    assert (again.units_scored, again.units_reused) == (0, first.units_scored)
    assert again.rows_reused == len(ROWS)
    assert again.rows_by_status == first.rows_by_status
    assert objects(again.scores_path) | objects(str(again.cherry_path)) == before


def test_a_rerun_with_nothing_new_starts_no_model(
    ray_local: None, config_for: ConfigFor, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.run(config_for(corpus)).summary

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an actor with a model would be started")

    monkeypatch.setattr(scoring, "ActorPoolStrategy", refuse)
    monkeypatch.setattr(recovery, "_CellActor", refuse)
    again = run.run(config_for(corpus, select={"count": 2})).summary
    assert again.score_fingerprint == first.score_fingerprint
    assert (again.units_scored, again.selected_rows) == (0, 2)


def test_only_what_is_new_is_scored(ray_local: None, config_for: ConfigFor, corpus: Path) -> None:
    config = config_for(corpus)
    first = run.score(config).summary
    write_parquet(corpus / "shard-9.parquet", [{**ROWS[0], "instruction": "Something new."}])
    second = run.score(config).summary
    assert (second.units_scored, second.rows_reused) == (1, first.rows)


def test_scores_do_not_depend_on_the_number_of_actors_to_the_bit(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    runs = [
        run.score(
            config_for(
                corpus,
                output=str(tmp_path / f"out-{actors}"),
                score={"unit_rows": 5},
                cluster={"actors": actors},
            )
        ).summary
        for actors in (1, 2)
    ]
    assert objects(runs[0].scores_path) == objects(runs[1].scores_path)


def test_scores_and_selection_do_not_depend_on_the_order_of_shards(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    paths = sorted(str(path) for path in corpus.iterdir())
    runs = [
        run.run(
            config_for(corpus, input={"path": order}, output=str(tmp_path / f"out-{number}"))
        ).summary
        for number, order in enumerate((paths, paths[::-1]))
    ]
    assert objects(runs[0].scores_path) == objects(runs[1].scores_path)
    assert objects(str(runs[0].cherry_path)) == objects(str(runs[1].cherry_path))


@pytest.mark.parametrize("changes", [{"unit_rows": 3}, {"max_batch_tokens": 64}, {"share": []}])
def test_unit_pack_size_and_shared_work_change_no_score_beyond_rounding(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = run.score(config_for(corpus, output=str(tmp_path / "plain"))).summary
    other = run.score(config_for(corpus, output=str(tmp_path / "other"), score=changes)).summary
    assert plain.score_fingerprint == other.score_fingerprint
    expected = by_content(plain.scores_path)
    found = by_content(other.scores_path)
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row == pytest.approx(expected[key], rel=1e-5)


def test_another_fraction_costs_no_scoring_and_is_another_subset(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    small = run.run(config_for(corpus, select={"count": 3})).summary
    large = run.select(config_for(corpus, select={"count": 6})).summary
    assert large.units_scored == 0
    assert small.cherry_path != large.cherry_path
    assert Path(str(small.cherry_path)).exists()
    first, second = (pq.read_table(str(s.cherry_path)) for s in (small, large))
    assert second.slice(0, 3).equals(first)  # a prefix is itself a smaller subset
    assert second["rank"].to_pylist() == list(range(6))
    latest = json.loads((Path(large.scores_path).parents[1] / "LATEST.json").read_text())
    assert str(large.manifest).endswith(latest["manifest"])


def test_max_rows_takes_the_first_rows_of_the_first_shards(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    summary = run.score(config_for(corpus, input={"max_rows": 17})).summary
    parts = read_parts(summary.scores_path)
    shards = [Path(s).name for s in parts["shard"].to_pylist()]
    assert shards == ["shard-0.parquet"] * 15 + ["shard-1.parquet"] * 2


def test_layouts_and_formats_of_one_corpus_mix(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    write_parquet(folder / "a.parquet", ROWS[:5])
    chat = [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    ]
    write_parquet(folder / "b.parquet", chat)
    lines = [json.dumps({"prompt": "three", "completion": "four five"}), "{broken"]
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    config = config_for(
        folder, score={"max_error_fraction": 0.2}, select={"fraction": 1.0, "max_ifd": None}
    )
    summary = run.run(config).summary
    assert summary.rows_by_status == {"malformed": 1, "ok": 7}
    subset = pq.read_table(str(summary.cherry_path))
    names = ["instruction", "input", "output", "messages", "prompt", "completion"]
    assert subset.schema.names[:6] == names
    assert "_cherry_bad_line" not in subset.schema.names
    parts = read_parts(summary.scores_path)
    (reason,) = [r for r in parts["reason"].to_pylist() if r]
    assert reason.startswith("bad_line: line 2:")


def _damage(path: Path) -> None:
    """Break the first column's pages and leave the footer whole."""
    chunk = pq.read_metadata(path).row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    raw = bytearray(path.read_bytes())
    raw[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(raw)


def test_a_shard_that_breaks_while_running_is_named_and_the_others_are_kept(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    _damage(corpus / "shard-1.parquet")
    with pytest.raises(ShardError, match=r"shard-1\.parquet"):
        run.run(config_for(corpus))
    summary = run.run(config_for(corpus, input={"on_bad_shard": "skip"})).summary
    assert summary.rows == len(ROWS) - 15
    assert "shard-1.parquet" in summary.skipped_shards[0]
    assert summary.selected_rows > 0
    # No part will ever be there, and selecting again does not wait for one.
    again = run.select(config_for(corpus, input={"on_bad_shard": "skip"})).summary
    assert again.skipped_shards == summary.skipped_shards
    assert again.manifest == summary.manifest
    with pytest.raises(InputError, match="units are not scored yet"):
        run.select(config_for(corpus))


@pytest.mark.parametrize("on_bad_shard", ["fail", "skip"])
def test_a_shard_that_is_overwritten_while_running_gives_no_row_another_ones_score(
    ray_local: None, config_for: ConfigFor, corpus: Path, on_bad_shard: str
) -> None:
    """Before its rows are read, or between that and the writing: whichever it is, nothing is said
    to be done."""

    class Overwrite(Silence):
        def unit(self, pace: Pace) -> None:
            if pace.done == 1:
                for path in corpus.iterdir():
                    write_parquet(corpus.with_name("new"), ROWS[::-1])
                    corpus.with_name("new").replace(path)

    config = config_for(corpus, input={"on_bad_shard": on_bad_shard}, select={"fraction": 1.0})
    with pytest.raises((StorageError, RayTaskError), match="overwritten while it was in use"):
        run.run(config, Overwrite())
    assert not Path(config.output, "LATEST.json").exists()
    again = run.run(config).summary
    assert again.rows == 3 * len(ROWS)


def test_one_unit_loads_one_model(
    ray_local: None, config_for: ConfigFor, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    pool = scoring.ActorPoolStrategy

    def noted(**options: Any) -> Any:
        asked.append(options)
        return pool(**options)

    monkeypatch.setattr(scoring, "ActorPoolStrategy", noted)
    run.score(config_for(corpus / "shard-0.parquet", cluster={"actors": 2}))
    assert [(each["min_size"], each["max_size"]) for each in asked] == [(1, 1)]


def test_statuses_add_up_and_unscored_rows_are_never_selected(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    rows = [
        *ROWS[:6],
        {"instruction": "A", "input": "", "output": ""},
        {"instruction": "word " * 900, "input": "", "output": "one two"},
        {"instruction": None, "input": "", "output": "one"},
    ]
    write_parquet(tmp_path / "in/a.parquet", rows)
    config = config_for(
        tmp_path / "in",
        score={"max_error_fraction": 1.0},
        select={"fraction": 1.0, "max_ifd": None},
    )
    summary = run.run(config).summary
    assert summary.rows_by_status == {
        "empty_response": 1, "malformed": 1, "ok": 6, "prompt_overlong": 1,
    }  # fmt: skip
    assert failed_fraction(summary.rows_by_status) == pytest.approx(1 / 9)
    assert summary.selected_rows == 6


def test_a_huge_row_is_a_row(ray_local: None, config_for: ConfigFor, tmp_path: Path) -> None:
    huge = {"instruction": "A", "input": "", "output": "the sea and the wind " * 50_000}
    write_parquet(tmp_path / "in/a.parquet", [huge, ROWS[0]])
    summary = run.score(config_for(tmp_path / "in")).summary
    parts = read_parts(summary.scores_path)
    assert parts["status"].to_pylist() == ["ok", "ok"]
    assert parts["truncated"].to_pylist() == [True, False]
    assert parts["num_response_tokens"].to_pylist()[0] < 512


def test_tokens_scored_are_the_lengths_of_both_passes(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "in/a.parquet", ROWS[:1])
    summary = run.score(config_for(tmp_path / "in")).summary
    (row,) = read_parts(summary.scores_path).to_pylist()
    marker = len(make_tokenizer().encode("### Response:"))
    conditioned = row["num_prompt_tokens"] + row["num_response_tokens"]
    assert summary.tokens_scored == conditioned + marker + row["num_direct_tokens"]


def test_two_drivers_on_one_output_converge(
    config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    """Their packs differ, so that their scores do in the last bits: no part is mixed of both."""
    drivers = []
    for name, max_batch_tokens in (("one", 64), ("other", 4096)):
        path = tmp_path / f"{name}.yaml"
        score = {"unit_rows": 4, "max_batch_tokens": max_batch_tokens}
        path.write_text(yaml.safe_dump(config_for(corpus, score=score).model_dump(mode="json")))
        drivers.append(
            subprocess.Popen(
                [sys.executable, "-m", "pipeline", "run", str(path), "--json"],
                cwd=REPOSITORY, env={**os.environ, "RAY_ADDRESS": "local"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    answers = [driver.communicate(timeout=300) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], answers
    one, other = (json.loads(stdout.splitlines()[-1]) for stdout, _ in answers)
    for key in ("manifest", "cut", "selected_rows", "rows_by_status", "scores_path"):
        assert one[key] == other[key]
    parts = list(Path(one["scores_path"]).iterdir())
    assert len(parts) == one["units_total"]
    packs = {pq.read_schema(p).metadata[b"cherry.max_batch_tokens"] for p in parts}
    assert packs <= {b"64", b"4096"}
    assert len(list(Path(one["cherry_path"]).parent.iterdir())) == 1


def compiled_of(scores_path: str) -> set[bytes]:
    """What parts say that ran compiled."""
    return {
        pq.read_schema(path).metadata[b"cherry.compiled"]
        for path in Path(scores_path).glob("*.parquet")
    }


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_layers_of_a_cpu_are_compiled_where_the_corpus_is_long(
    ray_local: None, config_for: ConfigFor, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = job.check(config_for(corpus), selecting=False)
    work = checked.num_parameters * len(ROWS)
    monkeypatch.setattr(job, "_WORTH_COMPILING", work + 1)
    short = run.score(checked.config).summary
    assert compiled_of(short.scores_path) <= {b"kernels", b"nothing"}
    monkeypatch.setattr(job, "_WORTH_COMPILING", work)
    output = checked.config.output + "-long"
    long = run.score(checked.config.model_copy(update={"output": output})).summary
    scored, before = by_content(long.scores_path), by_content(short.scores_path)
    assert scored.keys() == before.keys()
    for sample, losses in scored.items():
        assert losses == pytest.approx(before[sample], rel=1e-5)
    assert compiled_of(long.scores_path) == {b"layers"}


def test_what_is_asked_for_and_other_devices_keep_their_way(
    ray_local: None, config_for: ConfigFor, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_WORTH_COMPILING", 0)

    def compiled(**sections: Any) -> object:
        return job.plan(
            job.check(config_for(corpus, **sections), selecting=False)
        ).settings.compiled

    assert compiled() is True
    assert compiled(score={"compile": False}) is False
    rows = 12
    checked = job.check(
        config_for(corpus, input={"path": str(corpus), "max_rows": rows}), selecting=False
    )
    monkeypatch.setattr(job, "_WORTH_COMPILING", checked.num_parameters * rows + 1)
    assert job.plan(checked).settings.compiled == "auto"
    monkeypatch.setattr(job, "_WORTH_COMPILING", 0)
    monkeypatch.setattr("pipeline.cluster.scores_on_gpus", lambda _: True)
    assert compiled() == "auto"  # which is layers there
