"""Work units: a pure plan of footers and settings, with ids that name what can change a score."""

from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROWS, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from pipeline import samples, storage, units
from pipeline.config import InputConfig
from pipeline.inputs import Corpus, Shard, open_corpus
from pipeline.layouts import Columns
from pipeline.settings import ModelRef, ScoringSettings
from pipeline.units import Plan, Unit, auto_unit_rows, cut_rows, make_plan

ROW_GROUPS = st.lists(st.integers(0, 40), max_size=12).map(tuple)
TARGETS = st.integers(1, 25)
COLUMNS = Columns("alpaca", {"instruction": "instruction", "response": "output"})


def shard(**changes: Any) -> Shard:
    values: dict[str, Any] = {
        "url": "s3://c/part-0.parquet",
        "read_url": "s3://c/part-0.parquet",
        "size": 1000,
        "version": "etag-1",
        "columns": COLUMNS,
        "schema": pa.schema([("instruction", pa.string()), ("output", pa.string())]),
        "row_groups": (10,),
        "text_bytes": 900,
        "all_bytes": 1_000,
    }
    return Shard(**{**values, **changes})


def plan_of(*shards: Shard, **changes: Any) -> Plan:
    values = {
        "output": "s3://o/run",
        "score_fp": "fp",
        "unit_rows": 4,
        "num_parameters": 10**8,
        "max_rows": None,
    }
    return make_plan(Corpus(shards), **{**values, **changes})


def ids(plan: Plan) -> list[str]:
    return [unit.unit_id for unit in plan.units]


def ranges(plan: Plan) -> list[tuple[str, int, int]]:
    return [(unit.shard_url[-9], unit.start, unit.stop) for unit in plan.units]


# Cutting


@pytest.mark.parametrize(
    ("row_groups", "target", "pieces"),
    [
        ((3, 3, 3, 10), 5, [(0, 6), (6, 9), (9, 14), (14, 19)]),  # the docstring's
        ((5, 5), 5, [(0, 5), (5, 10)]),
        ((6,), 5, [(0, 3), (3, 6)]),
        ((1, 1, 1), 100, [(0, 3)]),
        ((0, 4, 0, 4, 0), 4, [(0, 4), (4, 8)]),
        ((0,), 5, []),
        ((), 5, []),
        ((7,), 1, [(i, i + 1) for i in range(7)]),
    ],
)
def test_cut_rows(row_groups: tuple[int, ...], target: int, pieces: list[tuple[int, int]]) -> None:
    assert list(cut_rows(row_groups, target)) == pieces


def test_one_large_row_group_is_many_units() -> None:
    # 52,002 rows, one row group: the file that most IFD runs begin with.
    pieces = list(cut_rows((52_002,), 1_000))
    assert len(pieces) == 53
    assert {stop - start for start, stop in pieces} == {981, 982}


@given(ROW_GROUPS, TARGETS)
def test_pieces_are_a_partition_in_order(row_groups: tuple[int, ...], target: int) -> None:
    pieces = list(cut_rows(row_groups, target))
    assert [row for piece in pieces for row in range(*piece)] == list(range(sum(row_groups)))
    assert all(stop > start for start, stop in pieces)


@given(ROW_GROUPS, TARGETS)
def test_no_piece_is_much_over_the_target(row_groups: tuple[int, ...], target: int) -> None:
    # At worst target - 1 rows wait when a whole group of target rows joins them.
    assert all(stop - start <= 2 * target - 1 for start, stop in cut_rows(row_groups, target))


@given(ROW_GROUPS, TARGETS)
def test_small_row_groups_stay_whole(row_groups: tuple[int, ...], target: int) -> None:
    cuts = {stop for _, stop in cut_rows(row_groups, target)}
    for start, stop in pairwise([0, *accumulate(row_groups)]):
        if stop - start <= target:
            assert not cuts & set(range(start + 1, stop))


@given(ROW_GROUPS, TARGETS)
def test_small_pieces_are_rare(row_groups: tuple[int, ...], target: int) -> None:
    # Short of the target: slices of a large group (over half of it), what lies before one, the end.
    pieces = list(cut_rows(row_groups, target))
    short = sum(2 * (stop - start) < target for start, stop in pieces)
    large = sum(num_rows > target for num_rows in row_groups)
    assert short <= large + 1


# Units of auto size


def test_auto_unit_rows_by_hand() -> None:
    # 400 text bytes a row are 100 tokens, 200 in two passes: 131,072 / 200 and 2**20 / 200.
    rows = shard(row_groups=(100,), text_bytes=40_000)
    assert auto_unit_rows(rows, 135_000_000) == 655
    assert auto_unit_rows(rows, 260_000) == 5243


def test_auto_unit_rows_of_empty_and_huge_rows() -> None:
    assert auto_unit_rows(shard(row_groups=(), text_bytes=0), 10**8) == 131_072
    assert auto_unit_rows(shard(row_groups=(10,), text_bytes=0), 10**8) == 131_072
    assert auto_unit_rows(shard(row_groups=(1,), text_bytes=10**10), 10**8) == 1


def test_auto_is_what_the_plan_uses() -> None:
    rows = shard(row_groups=(1310,), text_bytes=1310 * 400)
    assert ranges(plan_of(rows, unit_rows="auto")) == [("0", 0, 655), ("0", 655, 1310)]


# Planning


def test_plan_by_hand() -> None:
    plan = plan_of(shard(), shard(url="s3://c/part-1.parquet", row_groups=(2, 3, 1)))
    assert ranges(plan) == [("0", 0, 3), ("0", 3, 6), ("0", 6, 10), ("1", 0, 5), ("1", 5, 6)]
    assert plan.num_rows == 16
    assert plan.scores_url == "s3://o/run/scores/fp"
    assert plan.part_url(plan.units[0]) == f"s3://o/run/scores/fp/{plan.units[0].unit_id}.parquet"


def test_planning_twice_gives_the_same_plan() -> None:
    shards = [shard(url=f"s3://c/part-{n}.parquet", row_groups=(n, 7, 30)) for n in range(5)]
    assert plan_of(*shards) == plan_of(*shards)


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [
        (1, [("0", 0, 1)]),
        (3, [("0", 0, 3)]),
        (4, [("0", 0, 3), ("0", 3, 4)]),
        (10, [("0", 0, 3), ("0", 3, 6), ("0", 6, 10)]),
        (11, [("0", 0, 3), ("0", 3, 6), ("0", 6, 10), ("1", 0, 1)]),
        (99, [("0", 0, 3), ("0", 3, 6), ("0", 6, 10), ("1", 0, 3), ("1", 3, 6), ("1", 6, 10)]),
    ],
)
def test_max_rows_takes_the_first_rows(max_rows: int, expected: list[Any]) -> None:
    plan = plan_of(shard(), shard(url="s3://c/part-1.parquet"), max_rows=max_rows)
    assert ranges(plan) == expected
    assert plan.num_rows == min(max_rows, 20)


def test_max_rows_keeps_the_ids_of_whole_units() -> None:
    # A try over 6 rows pays for the first units of the whole run.
    assert ids(plan_of(shard(), max_rows=6)) == ids(plan_of(shard()))[:2]


@given(ROW_GROUPS, ROW_GROUPS, TARGETS, st.integers(1, 200))
def test_max_rows_is_a_prefix(one: Any, other: Any, target: int, max_rows: int) -> None:
    shards = [shard(row_groups=one), shard(url="s3://c/part-1.parquet", row_groups=other)]

    def rows(plan: Plan) -> list[tuple[str, int]]:
        return [(u.shard_url, row) for u in plan.units for row in range(u.start, u.stop)]

    limited = plan_of(*shards, unit_rows=target, max_rows=max_rows)
    assert rows(limited) == rows(plan_of(*shards, unit_rows=target))[:max_rows]


@pytest.mark.parametrize(
    "changed",
    [
        shard(url="s3://c/part-00.parquet"),
        shard(size=1001),
        shard(version="etag-2"),
        shard(columns=Columns("prompt_completion", COLUMNS.names)),
        shard(columns=Columns("alpaca", {"instruction": "instruction", "response": "answer"})),
        shard(columns=Columns("alpaca", {"instruction": "output", "response": "instruction"})),
        shard(columns=Columns("alpaca", {**COLUMNS.names, "input": "input"})),
    ],
    ids=["path", "size", "etag", "layout", "mapped", "swapped", "input"],
)
def test_what_changes_the_rows_changes_every_id(changed: Shard) -> None:
    assert not set(ids(plan_of(changed))) & set(ids(plan_of(shard())))


def test_score_fingerprint_changes_every_id_and_the_folder() -> None:
    plan, other = plan_of(shard()), plan_of(shard(), score_fp="fp2")
    assert not set(ids(plan)) & set(ids(other))
    assert other.scores_url == "s3://o/run/scores/fp2"


@pytest.mark.parametrize("name", ["CANONICALISER_VERSION", "INGEST_VERSION"])
def test_versions_of_the_code_change_every_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ids(plan_of(shard()))
    monkeypatch.setattr(units, name, getattr(units, name) + 1)
    assert not set(ids(plan_of(shard()))) & set(before)


def test_row_range_changes_the_id() -> None:
    assert ids(plan_of(shard(), unit_rows=5)) != ids(plan_of(shard(row_groups=(9,)), unit_rows=5))
    found = ids(plan_of(shard(), unit_rows=1)) + ids(plan_of(shard(), unit_rows=2))
    assert len(set(found)) == 15


@pytest.mark.parametrize(
    "same",
    [
        shard(read_url="/elsewhere/piece-00000.parquet"),
        shard(text_bytes=901, all_bytes=1_001),
        shard(schema=pa.schema([("output", pa.string())])),
        shard(columns=Columns("alpaca", {"response": "output", "instruction": "instruction"})),
    ],
    ids=["read_url", "bytes", "schema", "order of fields"],
)
def test_what_cannot_change_a_score_leaves_the_ids(same: Shard) -> None:
    assert ids(plan_of(same)) == ids(plan_of(shard()))


def test_ids_do_not_depend_on_the_output_or_the_model_size() -> None:
    plan = plan_of(shard())
    assert ids(plan) == ids(plan_of(shard(), output="/elsewhere"))
    assert ids(plan) == ids(plan_of(shard(), num_parameters=10))


def test_one_more_shard_leaves_the_units_that_were_there() -> None:
    before = plan_of(shard(url="s3://c/part-1.parquet"))
    grown = plan_of(shard(), shard(url="s3://c/part-1.parquet"), shard(url="s3://c/part-2.parquet"))
    assert set(ids(before)) < set(ids(grown))


@given(st.text(max_size=8), st.integers(0, 2**60), st.integers(0, 2**60), st.text(max_size=4))
def test_a_unit_survives_its_journey_as_json(url: str, start: int, more: int, column: str) -> None:
    columns = Columns("alpaca", {"instruction": column, "response": "output"})
    unit = Unit("id", url, url + "#0", columns, start, start + more, "fp", "in")
    assert Unit.from_json(unit.to_json()) == unit


# Plans of real corpora


def test_order_of_the_configs_paths_is_irrelevant(corpus: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(corpus.iterdir())]
    output = str(tmp_path / "out")
    plans = [
        make_plan(open_corpus(InputConfig(path=p), output), output, "fp", 4, 10**8, None)
        for p in (paths, paths[::-1], [paths[1], str(corpus)], str(corpus), f"{corpus}/*.parquet")
    ]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0].num_rows == 40


def test_a_rewritten_shard_has_new_units(corpus: Path, tmp_path: Path) -> None:
    def planned() -> dict[str, list[str]]:
        opened = open_corpus(InputConfig(path=str(corpus)), str(tmp_path / "out"))
        plan = make_plan(opened, str(tmp_path / "out"), "fp", 4, 10**8, None)
        return {
            name: [u.unit_id for u in plan.units if u.shard_url.endswith(name)]
            for name in ("shard-0.parquet", "shard-1.parquet")
        }

    before = planned()
    write_parquet(corpus / "shard-1.parquet", ROWS[15:31])
    after = planned()
    assert after["shard-0.parquet"] == before["shard-0.parquet"]
    assert not set(after["shard-1.parquet"]) & set(before["shard-1.parquet"])


def test_pending_is_what_has_no_part(corpus: Path, tmp_path: Path) -> None:
    opened = open_corpus(InputConfig(path=str(corpus)), str(tmp_path / "out"))
    plan = make_plan(opened, str(tmp_path / "out"), "fp", 5, 10**8, None)
    units_8 = list(plan.units)
    assert plan.pending(plan.parts()) == units_8  # nor is there a folder yet
    for unit in (units_8[1], units_8[4]):
        storage.publish(plan.part_url(unit), b"part")
    Path(plan.scores_url, f"{units_8[0].unit_id}.parquet.tmp").write_bytes(b"left behind")
    Path(plan.scores_url, f".{units_8[0].unit_id}.parquet").write_bytes(b"left behind")
    Path(plan.scores_url, "another.parquet").write_bytes(b"of a shard that is gone")
    assert plan.pending(plan.parts()) == [units_8[i] for i in (0, 2, 3, 5, 6, 7)]
    for unit in plan.pending(plan.parts()):
        storage.publish(plan.part_url(unit), b"part")
    assert plan.pending(plan.parts()) == []
    assert plan.stale(plan.parts()) == [f"{plan.scores_url}/another.parquet"]


# The fingerprint of scoring

SETTINGS = ScoringSettings(
    model=ModelRef("/models/a", "directory", "sha256:1", "/cache"),
    template="alpaca",
    pair_tokens=True,
    max_length=512,
    dtype="float32",
    max_batch_tokens="auto",
)


def test_each_field_that_can_change_a_score_changes_the_fingerprint() -> None:
    base = SETTINGS.fingerprint("text", "tokenizer")
    others = [
        replace(SETTINGS, model=replace(SETTINGS.model, fingerprint="sha256:2")).fingerprint(
            "text", "tokenizer"
        ),
        replace(SETTINGS, pair_tokens=False).fingerprint("text", "tokenizer"),
        replace(SETTINGS, max_length=513).fingerprint("text", "tokenizer"),
        replace(SETTINGS, dtype="bfloat16").fingerprint("text", "tokenizer"),
        replace(SETTINGS, dtype="float16").fingerprint("text", "tokenizer"),
        SETTINGS.fingerprint("other text", "tokenizer"),
        SETTINGS.fingerprint("text", "other tokenizer"),
        SETTINGS.fingerprint("tokenizer", "text"),
    ]
    assert len({base, *others}) == 9


@pytest.mark.parametrize("name", ["RENDERING_VERSION", "SCORING_VERSION"])
def test_versions_of_scoring_change_the_fingerprint(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import settings

    before = SETTINGS.fingerprint("text", "tokenizer")
    monkeypatch.setattr(settings, name, getattr(settings, name) + 1)
    assert SETTINGS.fingerprint("text", "tokenizer") != before


@pytest.mark.parametrize(
    "same",
    [
        replace(SETTINGS, max_batch_tokens=4096),
        replace(SETTINGS, model=ModelRef("s3://m/a", "url", "sha256:1", "/tmp")),
    ],
    ids=["max_batch_tokens", "where the model is"],
)
def test_what_cannot_change_a_score_leaves_the_fingerprint(same: ScoringSettings) -> None:
    assert same.fingerprint("text", "tokenizer") == SETTINGS.fingerprint("text", "tokenizer")


def test_fingerprints_are_stable() -> None:
    # Pinned: a changed spelling of the hash would score every corpus in the world again.
    assert units.fingerprint({"b": 1, "a": "é"}) == units.fingerprint({"a": "é", "b": 1})
    assert units.fingerprint({"a": 1}) == "f9d86028c6e0d64e"
    assert samples.CANONICALISER_VERSION == 2
