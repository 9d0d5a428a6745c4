"""Row reuse: a row that was scored before is not paid for again, and nothing else changes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROWS, read_parts, write_parquet

from pipeline import reuse, run
from pipeline.schemas import KNOWN, PART

pytestmark = pytest.mark.ray
ConfigFor = Callable[..., Any]


def new_row(number: int) -> dict[str, str]:
    return {"instruction": f"A new line {number}.", "input": "", "output": f"the sea {number}"}


def known_part(path: Path, ids: list[bytes | None], nll: float = 2.0) -> str:
    """A part with these ids, all ok but those without an id."""
    turn = {
        "num_response_tokens": 3,
        "num_direct_tokens": 3,
        "nll_conditioned": nll,
        "nll_direct": 2 * nll,
    }
    rows = [
        {
            "row_index": index,
            "sample_id": sample,
            "status": "ok" if sample else "malformed",
            "num_prompt_tokens": index,
            "ifd_loss_ratio": 0.5,
            "turns": [turn],
            **turn,
        }
        for index, sample in enumerate(ids)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PART), path)
    return str(path)


def test_known_rows_are_found_and_no_others(ray_local: None, tmp_path: Path) -> None:
    source = random.Random(1)
    # Zero bytes at the end: numpy compares fixed-width strings without them.
    ids = [source.randbytes(16) for _ in range(300)] + [
        bytes([n]) + bytes(15) for n in range(1, 250)
    ]
    source.shuffle(ids)
    parts = [known_part(tmp_path / f"{n}.parquet", [*ids[n::4], None]) for n in range(4)]
    known = reuse.gather(parts)
    others = [source.randbytes(16) for _ in range(100)]
    asked: list[bytes | None] = [*ids, *others, None, None]
    source.shuffle(asked)
    positions, rows = reuse.find(known, asked)
    assert rows.schema.equals(KNOWN)
    assert sorted(positions) == [n for n, i in enumerate(asked) if i in set(ids)]
    assert rows["sample_id"].to_pylist() == [asked[p] for p in positions]
    assert rows["ifd_loss_ratio"].to_pylist() == [0.5] * len(ids)


def test_of_several_copies_the_first_part_counts(ray_local: None, tmp_path: Path) -> None:
    ids: list[bytes | None] = [bytes([7]) * 16]
    parts = [known_part(tmp_path / f"{n}.parquet", ids, nll=1.0 + n) for n in range(3)]
    _, rows = reuse.find(reuse.gather(parts), ids)
    assert rows["nll_conditioned"].to_pylist() == [1.0]


def test_nothing_known_and_nothing_asked(ray_local: None, tmp_path: Path) -> None:
    known = reuse.gather([known_part(tmp_path / "0.parquet", [b"a" * 16])])
    assert len(reuse.find(known, [])[1]) == len(reuse.find(known, [None])[0]) == 0
    assert np.array_equal(reuse.find(known, [b"b" * 16])[0], np.empty(0))


def test_a_damaged_old_part_is_passed_over(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    good = known_part(tmp_path / "good.parquet", [b"a" * 16])
    known = reuse.gather([str(tmp_path / "damaged.parquet"), good])
    assert len(reuse.find(known, [b"a" * 16])[0]) == 1


def rewritten(corpus: Path, config: Any) -> tuple[Any, Any]:
    """Score a corpus, rewrite every shard with a new row in the middle, and score it again."""
    first = run.score(config).summary
    for number, path in enumerate(sorted(corpus.iterdir())):
        rows = pq.read_table(path).to_pylist()
        rows.insert(len(rows) // 2, new_row(number))
        write_parquet(path, rows)
    return first, run.score(config).summary


def test_of_rewritten_shards_only_new_rows_are_scored(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, score={"unit_rows": 6})
    first, second = rewritten(corpus, config)
    assert second.units_scored == second.units_total
    assert (second.rows, second.rows_reused) == (len(ROWS) + 3, len(ROWS))
    assert second.rows_by_status == {"ok": len(ROWS) + 3}
    assert second.tokens_scored < 0.15 * first.tokens_scored
    scratch = run.score(config_for(corpus, output=str(tmp_path / "scratch"))).summary
    mine = {row["sample_id"]: row for row in read_parts(second.scores_path).to_pylist()}
    for row in read_parts(scratch.scores_path).to_pylist():
        for name in ("num_prompt_tokens", "num_response_tokens", "truncated", "status"):
            assert mine[row["sample_id"]][name] == row[name]
        for name in ("nll_conditioned", "nll_direct", "ifd_loss_ratio", "ifd_ppl_ratio"):
            assert mine[row["sample_id"]][name] == pytest.approx(row[name], rel=1e-5)


def test_a_growing_file_pays_for_what_was_appended(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    path = tmp_path / "corpus" / "all.parquet"
    write_parquet(path, ROWS)
    config = config_for(path, score={"unit_rows": 8})
    first = run.score(config).summary
    write_parquet(path, [*ROWS, new_row(1), new_row(2)])
    second = run.score(config).summary
    assert (second.rows_reused, second.rows) == (len(ROWS), len(ROWS) + 2)
    assert 0 < second.tokens_scored < 0.1 * first.tokens_scored


def test_rows_that_moved_keep_their_scores(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    """Shuffled into other shards and cut into other units: no row is scored again."""
    config = config_for(corpus, score={"unit_rows": 7})
    first = run.score(config).summary
    before = {
        r["sample_id"]: r["nll_conditioned"] for r in read_parts(first.scores_path).to_pylist()
    }
    rows = ROWS.copy()
    random.Random(3).shuffle(rows)
    for path in corpus.iterdir():
        path.unlink()
    write_parquet(corpus / "other.parquet", rows[:11])
    write_parquet(corpus / "another.parquet", rows[11:])
    second = run.score(config).summary
    assert (second.tokens_scored, second.tokens_per_s) == (0, None)
    assert second.rows_reused == len(ROWS)
    after = read_parts(second.scores_path).to_pylist()
    assert all(before[r["sample_id"]] == r["nll_conditioned"] for r in after)


def test_conversations_keep_every_turn(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    def conversation(number: int) -> dict[str, Any]:
        words = ["one", "two the sea", "three", f"four {number}"]
        return {"messages": [
            {"role": ("user", "assistant")[n % 2], "content": w} for n, w in enumerate(words)
        ]}  # fmt: skip

    path = tmp_path / "chat.parquet"
    write_parquet(path, [conversation(n) for n in range(6)])
    config = config_for(path, score={"preset": "chat"})
    first = read_parts(run.score(config).summary.scores_path).to_pylist()
    write_parquet(path, [conversation(n) for n in range(5, -1, -1)])
    run.score(config)
    parts = sorted(
        Path(tmp_path, "out/scores").glob("*/*.parquet"), key=lambda p: p.stat().st_mtime_ns
    )
    second = pq.read_table(parts[-1]).to_pylist()
    assert [len(row["turns"]) for row in second] == [2] * 6
    assert [row["turns"] for row in second[::-1]] == [row["turns"] for row in first]


@pytest.mark.parametrize("changes", [{"reuse": "units"}, {"max_length": 64}])
def test_no_row_is_taken_from_elsewhere(
    ray_local: None, config_for: ConfigFor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Neither when told so, nor from other settings' scores."""
    path = tmp_path / "all.parquet"
    write_parquet(path, ROWS)
    run.score(config_for(path))
    write_parquet(path, ROWS[::-1])
    again = run.score(config_for(path, score=changes)).summary
    assert (again.rows_reused, again.tokens_scored > 0) == (0, True)


def test_a_killed_run_finds_no_rows_in_its_own_parts(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    """Equal rows in two shards: what one unit got must not reach the other when a run goes on,
    or it would end with other bytes than an undisturbed run."""
    for name in ("a", "b"):
        write_parquet(tmp_path / "corpus" / f"{name}.parquet", ROWS[:10])
    config = config_for(tmp_path / "corpus")
    first = run.score(config).summary
    parts = sorted(Path(first.scores_path).iterdir())
    bytes_before = parts[1].read_bytes()
    parts[1].unlink()
    again = run.score(config).summary
    assert (again.units_scored, again.rows_reused) == (1, 10)
    assert again.tokens_scored == first.tokens_scored / 2
    assert parts[1].read_bytes() == bytes_before
