"""Selection against an oracle that sorts every row in one process.

A test states its corpus as rows of (ratio, sample_id, status, tokens); they are written as shards
and, without a model, as the parts that scoring would have left. Then everything is the real thing.
"""

import hashlib
import itertools
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import selection, subset, survey
from pipeline.accounting import audit
from pipeline.config import InputConfig, SelectConfig
from pipeline.errors import InputError, StorageError
from pipeline.inputs import Corpus, open_corpus
from pipeline.schemas import BAD_LINE, PART, SELECTED
from pipeline.selection import Selection
from pipeline.survey import SelectSettings, Survey, from_keys, to_keys
from pipeline.units import Plan, make_plan

ray = pytest.mark.ray
WITH_RAY = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Row:
    """One input row and its score."""

    ratio: float | None
    sample_id: bytes | None
    status: str = "ok"
    tokens: int = 5


def row(ratio: float, name: int | bytes, tokens: int = 5) -> Row:
    """A scored row; `name` is its sample_id."""
    raw = name if isinstance(name, bytes) else name.to_bytes(16, "big")
    return Row(ratio, raw, "ok", tokens)


EMPTY = Row(None, b"e" * 16, "empty_response", 0)
MALFORMED = Row(None, None, "malformed", 0)


# Corpora on disk


def write_shards(
    folder: Path, shards: Sequence[Sequence[Row]], row_group_size: int | None = None
) -> str:
    """Alpaca shards whose instruction is `SHARD:ROW`."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(shards):
        names = pa.array([f"{number}:{i}" for i in range(len(rows))], pa.string())
        table = pa.table({"instruction": names, "output": names})
        pq.write_table(table, folder / f"shard-{number:03}.parquet", row_group_size=row_group_size)
    return str(folder)


def write_parts(plan: Plan, shards: Sequence[Sequence[Row]]) -> None:
    """The parts that scoring would leave; the ppl ratio runs against the loss ratio."""
    Path(plan.scores_url).mkdir(parents=True, exist_ok=True)
    urls = sorted({unit.shard_url for unit in plan.units})
    for unit in plan.units:
        rows = shards[urls.index(unit.shard_url)][unit.start : unit.stop]
        columns = {field.name: pa.nulls(len(rows), field.type) for field in PART}
        values = {
            "row_index": range(unit.start, unit.stop),
            "sample_id": [r.sample_id for r in rows],
            "status": [r.status for r in rows],
            "num_response_tokens": [r.tokens for r in rows],
            "ifd_loss_ratio": [r.ratio for r in rows],
            "ifd_ppl_ratio": [None if r.ratio is None else -r.ratio for r in rows],
        }
        for name, column in values.items():
            columns[name] = pa.array(column, PART.field(name).type)
        pq.write_table(pa.table(columns, schema=PART), plan.part_url(unit))


def scored(
    folder: Path,
    shards: Sequence[Sequence[Row]],
    unit_rows: int = 3,
    row_group_size: int | None = None,
) -> tuple[Plan, Corpus]:
    """A corpus that is scored and not selected from."""
    path = write_shards(folder / "corpus", [s for s in shards if s], row_group_size)
    return plan_of(path, folder / "out", [s for s in shards if s], unit_rows)


def plan_of(
    path: str, output: Path, shards: Sequence[Sequence[Row]], unit_rows: int = 3
) -> tuple[Plan, Corpus]:
    corpus = open_corpus(InputConfig(path=path), str(output))
    plan = make_plan(corpus, str(output), "fp", unit_rows, 1, None)
    write_parts(plan, shards)
    return plan, corpus


def wanted(by: Any = "ifd_loss_ratio", **config: Any) -> SelectSettings:
    return SelectSettings.from_config(SelectConfig.model_validate(config), by)


def select(
    plan: Plan, corpus: Corpus, output: str, settings: SelectSettings, score_fp: str
) -> tuple[Selection, Survey | None]:
    return selection.select(plan, corpus, output, settings, score_fp, audit(plan))


def select_into(
    folder: Path, plan: Plan, corpus: Corpus, **config: Any
) -> tuple[Selection, list[str]]:
    """Select, and name the rows that came out, in their order."""
    found, _ = select(plan, corpus, str(folder / "out"), wanted(**config), "fp")
    return found, names_of(found)


def names_of(found: Selection) -> list[str]:
    return read(found)["instruction"].to_pylist() if found.manifest["parts"] else []


def read(found: Selection) -> pa.Table:
    """All output parts in their order, checked against their manifest."""
    tables = []
    for part in found.manifest["parts"]:
        path = Path(found.url, part["path"])
        tables.append(pq.read_table(path))
        assert len(tables[-1]) == part["rows"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == part["sha256"]
    table = pa.concat_tables(tables)
    assert table["rank"].to_pylist() == list(range(found.manifest["selected_rows"]))
    return table


def files_of(folder: str | Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, modification time and bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            path.read_bytes(),
        )
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


# The oracle


@dataclass(frozen=True)
class Expected:
    names: list[str]
    duplicates: int
    cut: float | None
    eligible: int


def expect(shards: Sequence[Sequence[Row]], **config: Any) -> Expected:
    """What a selection must give: sort everything, drop later copies, cut."""
    rows = [
        (-r.ratio, r.sample_id, shard, index, r)
        for shard, shard_rows in enumerate([s for s in shards if s])
        for index, r in enumerate(shard_rows)
        if r.status == "ok" and r.ratio is not None
    ]
    low, high = config.get("min_ifd", -math.inf), config.get("max_ifd", 1.0)
    high = math.inf if high is None else high
    fewest = config.get("min_response_tokens", 1)
    eligible = [
        e for e in sorted(rows, key=lambda e: e[:4])
        if low <= e[4].ratio < high and e[4].tokens >= fewest
    ]  # fmt: skip
    num_rows = sum(len(s) for s in shards)
    base = {"all": num_rows, "scored": len(rows), "eligible": len(eligible)}
    if "threshold" in config:
        budget = len(eligible)
        considered = [e for e in eligible if e[4].ratio >= config["threshold"]]
    else:
        fraction = Fraction(str(config.get("fraction", "0.10")))
        budget = config.get("count", math.floor(fraction * base[config.get("of", "all")]))
        considered = eligible
    kept: list[Any] = []
    seen: set[bytes] = set()
    duplicates = 0
    for entry in considered:
        if len(kept) == budget:
            break
        duplicates += entry[1] in seen
        if entry[1] not in seen:
            seen.add(entry[1])
            kept.append(entry)
    return Expected(
        names=[f"{shard}:{index}" for _, _, shard, index, _ in kept],
        duplicates=duplicates,
        cut=kept[-1][4].ratio if kept else None,
        eligible=len(eligible),
    )


def check(folder: Path, shards: Sequence[Sequence[Row]], plan: Plan, corpus: Corpus, **c: Any):
    """Select, compare with the oracle, and give back the rows' names."""
    found, names = select_into(folder, plan, corpus, **c)
    expected = expect(shards, **c)
    assert names == expected.names
    manifest = found.manifest
    assert manifest["selected_rows"] == len(expected.names)
    assert manifest["duplicate_rows"] == expected.duplicates
    assert manifest["cut"] == expected.cut
    assert manifest["eligible_rows"] == expected.eligible
    assert manifest["rows"] == sum(len(s) for s in shards)
    statuses = Counter(r.status for s in shards for r in s)
    assert manifest["rows_by_status"] == statuses
    assert sum(manifest["rejected_rows"].values()) == statuses["ok"] - expected.eligible
    return names


# Keys

FINITE = st.floats(allow_nan=False, allow_infinity=False)
EDGES = st.sampled_from(
    [
        0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308,
        -1.7976931348623157e308, 1.0, math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0), -1.0,
        0.5, math.nextafter(0.5, 1.0), 0.9, 0.8999999999999999,
    ]
)  # fmt: skip


def keys_of(*ratios: float) -> list[int]:
    return to_keys(np.array(ratios, np.float64)).tolist()


def test_keys_by_hand() -> None:
    assert [hex(key) for key in keys_of(-1.0, 0.0, 1.0, math.inf)] == [
        "0x400fffffffffffff",
        "0x8000000000000000",
        "0xbff0000000000000",
        "0xfff0000000000000",
    ]


def test_zeros_have_one_key() -> None:
    assert len(set(keys_of(0.0, -0.0))) == 1


@given(st.lists(FINITE | EDGES | st.sampled_from([math.inf, -math.inf]), min_size=2))
def test_keys_have_the_order_of_their_ratios(ratios: list[float]) -> None:
    keys = keys_of(*ratios)
    for one, key in zip(ratios, keys, strict=True):
        for other, other_key in zip(ratios, keys, strict=True):
            assert (one < other) == (key < other_key)
            assert (one == other) == (key == other_key)


@given(st.lists(FINITE | EDGES))
def test_keys_turn_back_into_ratios(ratios: list[float]) -> None:
    back = from_keys(to_keys(np.array(ratios, np.float64))).tolist()
    assert [struct.pack("d", r + 0.0) for r in ratios] == [struct.pack("d", r) for r in back]


# Ranks and copies

# Ids that a comparison of C strings, or of signed bytes, would get wrong.
HARD_IDS = st.sampled_from(
    [
        bytes(16), bytes(15) + b"\1", b"\1" + bytes(15), b"\xff" * 16, b"\x80" + bytes(15),
        b"\x7f" + b"\xff" * 15, b"a\0b" + bytes(13), b"a\0c" + bytes(13), b"a" + bytes(15),
    ]
)  # fmt: skip
IDS = HARD_IDS | st.binary(min_size=16, max_size=16)
RATIOS = st.floats(0.0, 1.2) | st.sampled_from([0.25, 0.5, 0.5, 0.75, 1.0]) | EDGES | FINITE
CANDIDATES = st.lists(
    st.tuples(
        RATIOS | st.just(0.5), IDS | st.just(b"x" * 16), st.integers(0, 3), st.integers(0, 9)
    ),
    max_size=40,
)


def candidates(rows: list[tuple[float, bytes, int, int]]) -> Any:
    found = np.empty(len(rows), selection._CANDIDATE)
    if rows:
        ratios, found["sample_id"], found["unit"], found["row"] = zip(*rows, strict=True)
        found["key"] = to_keys(np.array(ratios, np.float64))
    return found


@given(CANDIDATES)
def test_ranks_are_those_of_a_plain_sort(rows: list[tuple[float, bytes, int, int]]) -> None:
    ranked = selection._rank(candidates(rows))
    order = sorted(rows, key=lambda r: (-r[0], r[1], r[2], r[3]))
    assert ranked.tolist() == candidates(order).tolist()


@given(st.lists(IDS | st.sampled_from([b"x" * 16, b"y" * 16]), max_size=40))
def test_first_copies(ids: list[bytes]) -> None:
    mask = selection._first_copies(candidates([(0.5, i, 0, n) for n, i in enumerate(ids)]))
    assert mask.tolist() == [i not in ids[:n] for n, i in enumerate(ids)]


# Budgets


def surveyed(scored_rows: int, eligible: int) -> Survey:
    survey = Survey(rows_by_status=Counter(ok=scored_rows))
    survey.histogram[7] = eligible
    return survey


@pytest.mark.parametrize(
    ("fraction", "num_rows", "expected"),
    [
        ("0.29", 100, 29),  # 0.29 * 100 is 28.999999999999996
        ("0.1", 52_002, 5200),
        ("0.07", 100, 7),  # 7.000000000000001
        ("0.0001", 9_999, 0),
        ("0.0001", 10_000, 1),
        ("0.999999999", 1_000_000_000, 999_999_999),
        ("1", 7, 7),
        ("1.00", 7, 7),
        ("0", 7, 0),
        ("0.3333333333333333333333333333", 3_000_000_000, 999_999_999),
        ("0.9999999999999999999999999999", 1_000_000_000, 999_999_999),
        # 1110.9999999999999999999999996884, which 28 digits round to 1111.
        ("0.1428571428571428571428571428", 7777, 1110),
        (0.29, 100, 29),  # as YAML reads it
    ],
)
def test_fraction_is_an_exact_decimal(fraction: Any, num_rows: int, expected: int) -> None:
    assert selection._budget(wanted(fraction=fraction), num_rows, surveyed(0, 0)) == expected


@given(
    st.decimals(0, 1, allow_nan=False, places=12) | st.decimals(0, 1, places=28),
    st.integers(0, 10**12),
)
def test_budget_is_the_floor_of_the_exact_product(fraction: Decimal, num_rows: int) -> None:
    budget = selection._budget(wanted(fraction=fraction), num_rows, surveyed(0, 0))
    assert budget == math.floor(Fraction(fraction) * num_rows)


@pytest.mark.parametrize(("of", "expected"), [("all", 50), ("scored", 40), ("eligible", 15)])
def test_fraction_is_a_share_of(of: str, expected: int) -> None:
    assert selection._budget(wanted(fraction="0.5", of=of), 100, surveyed(80, 30)) == expected


def test_count_and_threshold_are_no_share() -> None:
    assert selection._budget(wanted(count=0), 100, surveyed(80, 30)) == 0
    assert selection._budget(wanted(count=77), 100, surveyed(80, 30)) == 77
    assert selection._budget(wanted(threshold=0.0), 100, surveyed(80, 30)) is None


def test_default_is_a_tenth() -> None:
    assert wanted().fraction == "0.1"
    assert wanted(count=3).fraction is None
    assert wanted(threshold=0.5).fraction is None


@pytest.mark.parametrize("spelling", ["0.1", "0.10", "1E-1", 0.1, Decimal("0.100")])
def test_spellings_of_a_fraction_are_one_setting(spelling: Any) -> None:
    assert wanted(fraction=spelling) == wanted()


# Whole selections


@ray
def test_worked_example(ray_local: None, tmp_path: Path) -> None:
    shards = [
        [row(0.5, 1), EMPTY, row(0.9, 2), row(1.0, 3)],
        [row(0.9, 1), MALFORMED, row(0.7, 4), row(0.2, 5)],
    ]
    plan, corpus = scored(tmp_path, shards)
    found, _ = select_into(tmp_path, plan, corpus, fraction="0.5")
    table = read(found)
    # 4 of 8 rows. Of the copies of sample 1 the one at 0.9 ranks first; at 0.9 the ids decide.
    assert table.select(["instruction", "sample_id", "ifd_loss_ratio", "rank"]).to_pylist() == [
        {"instruction": n, "sample_id": i.to_bytes(16, "big"), "ifd_loss_ratio": r, "rank": k}
        for k, (n, i, r) in enumerate(
            [("1:0", 1, 0.9), ("0:2", 2, 0.9), ("1:2", 4, 0.7), ("1:3", 5, 0.2)]
        )
    ]
    assert table["ifd_ppl_ratio"].to_pylist() == [-0.9, -0.9, -0.7, -0.2]
    assert found.manifest == {
        "score_fingerprint": "fp",
        "select_fingerprint": Path(found.url).name,
        "settings": {
            "by": "ifd_loss_ratio", "fraction": "0.5", "count": None, "threshold": None,
            "of": "all", "min_ifd": None, "max_ifd": 1.0, "min_response_tokens": 1,
        },
        "rows": 8,
        "rows_by_status": {"empty_response": 1, "malformed": 1, "ok": 6},
        "eligible_rows": 5,
        "rejected_rows": {"at_or_over_max_ifd": 1},
        "asked_rows": 4,
        "selected_rows": 4,
        "duplicate_rows": 1,
        "cut": 0.2,
        "score_parts": {"count": 4, "sha256": audit(plan).digest},
        "parts": found.manifest["parts"],
    }  # fmt: skip
    assert json.loads(Path(found.manifest_url).read_bytes()) == found.manifest


def make_ratios(kind: str, count: int) -> list[float]:
    source = random.Random(kind)
    if kind == "random":
        return [source.random() * 1.2 for _ in range(count)]
    if kind == "tied":
        return [source.choice([0.3, 0.5, 0.7, 1.0]) for _ in range(count)]
    if kind == "skewed":  # nearly all in one bin of the histogram
        return [0.75 + source.random() * 1e-9 for _ in range(count - 9)] + [0.1] * 9
    if kind == "equal":
        return [0.625] * count
    if kind == "ascending":
        return [n / count for n in range(count)]
    edges = [
        -0.0, 0.0, 5e-324, -5e-324, 1e-310, -1e-310, 1e308, -1e308, 1.0, math.nextafter(1.0, 0.0),
        math.nextafter(1.0, 2.0), -1.0, -0.5,
    ]  # fmt: skip
    return [source.choice(edges) for _ in range(count)]


BUDGETS: list[dict[str, Any]] = [
    {"fraction": "0.29"},
    {"fraction": "1"},
    {"count": 1},
    {"count": 10_000},
    {"threshold": 0.5},
    {"threshold": -0.0},
    {"fraction": "0.5", "of": "scored"},
    {"fraction": "0.5", "of": "eligible", "max_ifd": None, "min_ifd": 0.0},
    {"count": 37, "max_ifd": 0.7, "min_response_tokens": 4},
]


@ray
@pytest.mark.parametrize("kind", ["random", "tied", "skewed", "equal", "ascending", "adversarial"])
def test_selection_is_the_oracles(ray_local: None, tmp_path: Path, kind: str) -> None:
    source = random.Random(1)
    # One in four ids has copies, with other ratios; one in ten rows has no score.
    rows = [
        row(ratio, source.randrange(1, 150) if source.random() < 0.25 else 1000 + n,
            source.randrange(1, 9))
        for n, ratio in enumerate(make_ratios(kind, 270))
    ] + [EMPTY, MALFORMED] * 15  # fmt: skip
    source.shuffle(rows)
    shards = [rows[:101], rows[101:102], rows[102:]]
    plan, corpus = scored(tmp_path, shards, unit_rows=4)
    assert len(plan.units) > survey._UNITS_PER_TASK  # several tasks take part
    for budget in BUDGETS:
        check(tmp_path, shards, plan, corpus, **budget)


ROWS_OF_CORPUS = st.lists(
    st.builds(row, RATIOS, st.integers(0, 9) | HARD_IDS, st.integers(1, 5))
    | st.sampled_from([EMPTY, MALFORMED]),
    min_size=1,
    max_size=30,
)
ANY_BUDGET = st.one_of(
    st.builds(lambda n: {"count": n}, st.integers(0, 12)),
    st.builds(lambda x: {"threshold": x}, RATIOS),
    st.builds(
        lambda f, of: {"fraction": f, "of": of},
        st.decimals(0, 1, places=2).map(str),
        st.sampled_from(["all", "scored", "eligible"]),
    ),
)
ELIGIBILITY = st.fixed_dictionaries(
    {},
    optional={
        "max_ifd": st.none() | RATIOS,
        "min_ifd": RATIOS,
        "min_response_tokens": st.integers(1, 4),
    },
)


@ray
@WITH_RAY
@given(ROWS_OF_CORPUS, st.integers(1, 9), ANY_BUDGET, ELIGIBILITY)
def test_any_selection_is_the_oracles(
    ray_local: None,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    unit_rows: int,
    budget: dict[str, Any],
    rules: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    shards = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    plan, corpus = scored(folder, shards, unit_rows)
    check(folder, shards, plan, corpus, **budget, **rules)


@ray
@WITH_RAY
@given(ROWS_OF_CORPUS, ANY_BUDGET, st.data())
def test_any_sharding_of_the_same_rows_gives_the_same_rows(
    ray_local: None,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    budget: dict[str, Any],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("sharding")
    outcomes = []
    for name in ("one", "other"):
        cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)), max_size=3)) | {0, len(rows)})
        shards = [rows[a:b] for a, b in itertools.pairwise(cuts)]
        starts = [a for a, b in itertools.pairwise(cuts) if b > a]
        plan, corpus = scored(
            folder / name,
            shards,
            unit_rows=data.draw(st.integers(1, 9)),
            row_group_size=data.draw(st.integers(1, 9)),
        )
        _, names = select_into(folder / name, plan, corpus, **budget)
        parts = [n.split(":") for n in names]
        outcomes.append([starts[int(shard)] + int(index) for shard, index in parts])
    assert outcomes[0] == outcomes[1]


@ray
def test_order_of_the_shards_changes_no_sample(ray_local: None, tmp_path: Path) -> None:
    source = random.Random(3)
    rows = [row(source.choice([0.3, 0.5, 0.7]), n % 17) for n in range(60)]
    outcomes = []
    for name in ("one", "other"):
        plan, corpus = scored(tmp_path / name, [rows[:25], rows[25:]])
        found, _ = select_into(tmp_path / name, plan, corpus, count=11)
        outcomes.append(read(found).select(SELECTED.names).to_pylist())
        rows.reverse()
    assert outcomes[0] == outcomes[1]


# Exact sizes


@ray
@pytest.mark.parametrize(
    "budget",
    [{"count": 0}, {"fraction": "0"}, {"fraction": "0.0999"}, {"threshold": 0.95}],
    ids=str,
)
def test_nothing_asked_is_nothing_selected(
    ray_local: None, tmp_path: Path, budget: dict[str, Any]
) -> None:
    # k = 0 must not become the slice [-0:], which is everything.
    plan, corpus = scored(tmp_path, [[row(n / 11, n) for n in range(10)]])
    found, names = select_into(tmp_path, plan, corpus, **budget)
    assert names == []
    assert found.manifest["selected_rows"] == 0
    assert found.manifest["cut"] is None
    assert found.manifest["parts"] == []
    assert sorted(files_of(found.url)) == ["_MANIFEST.json"]


@ray
@pytest.mark.parametrize(
    "rows",
    [[row(1.0, 1), row(1.5, 2)], [EMPTY, EMPTY, MALFORMED]],
    ids=["not under max_ifd", "not scored"],
)
def test_nothing_eligible_is_nothing_selected(
    ray_local: None, tmp_path: Path, rows: list[Row]
) -> None:
    plan, corpus = scored(tmp_path, [rows])
    for budget in ({"count": 2}, {"fraction": "1"}, {"threshold": 0.0}):
        found, names = select_into(tmp_path, plan, corpus, **budget)
        assert names == []
        assert found.manifest["eligible_rows"] == 0
        assert found.manifest["rows"] == len(rows)


@ray
def test_more_asked_than_eligible_is_all_eligible(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(0.1, 1), row(2.0, 2), row(0.3, 3), EMPTY]])
    found, names = select_into(tmp_path, plan, corpus, fraction="1")
    assert names == ["0:2", "0:0"]
    assert (found.manifest["asked_rows"], found.manifest["selected_rows"]) == (4, 2)


@ray
def test_limits_of_eligibility(ray_local: None, tmp_path: Path) -> None:
    under, over = math.nextafter(0.8, 0.0), math.nextafter(0.2, 0.0)
    rows = [row(0.8, 1), row(under, 2), row(0.2, 3), row(over, 4), row(0.5, 5, 3), row(0.6, 6, 2)]
    rows.append(row(0.9, 7, 1))  # too short and over max_ifd: the first reason counts
    plan, corpus = scored(tmp_path, [rows])
    rules = {"fraction": "1", "min_ifd": 0.2, "max_ifd": 0.8, "min_response_tokens": 3}
    found, names = select_into(tmp_path, plan, corpus, **rules)
    assert names == ["0:1", "0:4", "0:2"]
    assert found.manifest["rejected_rows"] == {
        "at_or_over_max_ifd": 1,
        "too_few_tokens": 2,
        "under_min_ifd": 1,
    }


@ray
def test_threshold_is_inclusive_and_exact(ray_local: None, tmp_path: Path) -> None:
    below = math.nextafter(0.5, 0.0)
    plan, corpus = scored(tmp_path, [[row(below, 1), row(0.5, 2), row(0.75, 3), row(1.0, 4)]])
    assert select_into(tmp_path, plan, corpus, threshold=0.5)[1] == ["0:2", "0:1"]
    assert select_into(tmp_path, plan, corpus, threshold=below)[1] == ["0:2", "0:1", "0:0"]


@ray
def test_the_ratio_that_is_asked_ranks_and_is_limited(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(-2.0, 1), row(-0.5, 2), row(0.5, 3)]])
    found, names = select_into(tmp_path, plan, corpus, by="ifd_ppl_ratio", fraction="1")
    assert names == ["0:1", "0:2"]  # their ppl ratios are 0.5 and -0.5; 2.0 is not under 1
    assert found.manifest["cut"] == -0.5


@ray
def test_a_smaller_fraction_is_a_prefix(ray_local: None, tmp_path: Path) -> None:
    source = random.Random(5)
    rows = [row(source.choice([0.2, 0.4, 0.6]), source.randrange(40)) for _ in range(90)]
    plan, corpus = scored(tmp_path, [rows[:31], rows[31:]], unit_rows=7)
    _, names = select_into(tmp_path, plan, corpus, fraction="0.4")
    for fraction in ("0.02", "0.1", "0.33"):
        _, fewer = select_into(tmp_path, plan, corpus, fraction=fraction)
        assert fewer == names[: math.floor(Fraction(fraction) * 90)]


# Ties and duplicates


@ray
def test_ties_go_by_id_then_shard_then_row(ray_local: None, tmp_path: Path) -> None:
    high, low, zero = b"\x80" + bytes(15), b"\x7f" + b"\xff" * 15, bytes(16)
    shards = [
        [row(0.5, low), row(0.5, low), row(0.5, high)],
        [row(0.5, high), row(0.5, zero)],
    ]
    plan, corpus = scored(tmp_path, shards, unit_rows=1)
    assert select_into(tmp_path, plan, corpus, fraction="1")[1] == ["1:1", "0:0", "0:2"]
    assert select_into(tmp_path, plan, corpus, count=2)[1] == ["1:1", "0:0"]


@ray
def test_zeros_tie_whatever_their_sign(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(0.0, 3), row(-0.0, 1), row(0.0, 2), row(-5e-324, 0)]])
    found, names = select_into(tmp_path, plan, corpus, count=3)
    assert names == ["0:1", "0:2", "0:0"]
    # What was scored is kept as it is: only the order takes the two for one.
    assert math.copysign(1, read(found)["ifd_loss_ratio"][0].as_py()) == -1


@ray
def test_copies_move_the_cut_down(ray_local: None, tmp_path: Path) -> None:
    # The histogram says that the top bin holds enough: 40 copies of one sample. Three more bins
    # follow, each with copies, before five different samples are found.
    rows = [row(0.9, 1)] * 40 + [row(0.5, 1)] * 5 + [row(0.4, 2)] + [row(0.3, 1)] * 30
    rows += [row(0.2, 2)] * 3 + [row(0.1, 3), row(0.05, 4), row(0.01, 5), row(0.005, 6)]
    random.Random(0).shuffle(rows)
    shards = [rows[:33], rows[33:]]
    plan, corpus = scored(tmp_path, shards, unit_rows=8)
    names = check(tmp_path, shards, plan, corpus, count=5)
    assert len(names) == 5
    found, _ = select_into(tmp_path, plan, corpus, count=5)
    assert read(found)["ifd_loss_ratio"].to_pylist() == [0.9, 0.4, 0.1, 0.05, 0.01]
    assert found.manifest["duplicate_rows"] == 39 + 5 + 30 + 3


@ray
def test_cut_that_moves_down_misses_no_key(ray_local: None, tmp_path: Path) -> None:
    # The largest key below the bin of 0.9, 0xbfebffffffffffff, is the first that the second look
    # may find: between the two looks nothing falls through.
    rows = [row(0.9, 1), row(0.9, 1), row(math.nextafter(0.875, 0.0), 2), row(0.5, 3)]
    plan, corpus = scored(tmp_path, [rows])
    assert select_into(tmp_path, plan, corpus, count=2)[1] == ["0:0", "0:2"]


@ray
@pytest.mark.parametrize(
    "budget",
    [{"count": 9}, {"threshold": 0.5}, {"fraction": "1"}],
    ids=["count", "thr", "fraction"],
)
def test_copies_are_counted_where_rows_run_out(
    ray_local: None, tmp_path: Path, budget: dict[str, Any]
) -> None:
    # Nothing ranks after the copies, and they were passed over all the same.
    plan, corpus = scored(tmp_path, [[row(0.9, 1), row(0.8, 2), row(0.7, 1), row(0.6, 1)]])
    found, names = select_into(tmp_path, plan, corpus, **budget)
    assert names == ["0:0", "0:1"]
    assert found.manifest["duplicate_rows"] == 2


@ray
def test_denominators_count_rows_before_copies_are_dropped(ray_local: None, tmp_path: Path) -> None:
    rows = [row(0.9, 1)] * 6 + [row(0.5, 2), row(0.4, 3), row(0.3, 4), row(0.2, 5)]
    plan, corpus = scored(tmp_path, [rows])
    for of in ("all", "scored", "eligible"):
        _, names = select_into(tmp_path, plan, corpus, fraction="0.4", of=of)
        assert names == ["0:0", "0:6", "0:7", "0:8"]  # 4 of 10 rows, not 2 of 5 samples


@ray
def test_a_copy_that_is_not_eligible_hides_no_other(ray_local: None, tmp_path: Path) -> None:
    rows = [row(1.5, 1), row(0.9, 1, tokens=1), row(0.4, 1), row(0.5, 2)]
    plan, corpus = scored(tmp_path, [rows])
    names = select_into(tmp_path, plan, corpus, fraction="1", min_response_tokens=2)[1]
    assert names == ["0:3", "0:2"]


# The survey, which the report shows


@ray
def test_survey_holds_the_extremes(ray_local: None, tmp_path: Path) -> None:
    rows = [row(0.5, n) for n in range(4)] + [row(0.9, 5), row(1.5, 6), row(0.1, 7), EMPTY]
    plan, corpus = scored(tmp_path, [rows[:3], rows[3:]], unit_rows=2)
    _, survey = select(plan, corpus, str(tmp_path / "out"), wanted(), "fp")
    assert [(u.start, u.stop) for u in plan.units] == [(0, 1), (1, 3), (0, 1), (1, 3), (3, 5)]
    best = (0.9, 3, 1)
    tied = [(0.5, 0, 0), (0.5, 1, 1), (0.5, 1, 2), (0.5, 2, 0)]
    assert survey.highest == [best, *tied]
    assert survey.lowest == [(0.1, 4, 3), *tied]
    assert (survey.scored, survey.eligible) == (7, 6)


# Bytes


@ray
def test_two_runs_give_the_same_bytes(ray_local: None, tmp_path: Path) -> None:
    source = random.Random(9)
    rows = [row(source.random(), source.randrange(60)) for _ in range(100)]
    plan, corpus = scored(tmp_path, [rows[:40], rows[40:]], unit_rows=5)
    contents = []
    for name in ("one", "other"):
        select(plan, corpus, str(tmp_path / name), wanted(fraction="0.3"), "fp")
        contents.append({n: f[2] for n, f in files_of(tmp_path / name).items()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3


_ONE_CPU = """
import pickle, sys
import ray
from pipeline import selection
from pipeline.accounting import audit
plan, corpus, settings = pickle.load(open(sys.argv[1], "rb"))
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=100_000_000)
selection.select(plan, corpus, sys.argv[2], settings, "fp", audit(plan))
"""


@ray
def test_number_of_workers_changes_no_byte(ray_local: None, tmp_path: Path) -> None:
    source = random.Random(4)
    rows = [row(source.choice([0.3, 0.6, 0.9]), source.randrange(300)) for _ in range(400)]
    plan, corpus = scored(tmp_path, [rows[:150], rows[150:]], unit_rows=4)
    job = (plan, corpus, wanted(fraction="0.2"))
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    select(*job[:2], str(tmp_path / "three"), job[2], "fp")
    command = [sys.executable, "-c", _ONE_CPU, str(tmp_path / "job"), str(tmp_path / "one")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, timeout=120)
    one, three = ({n: f[2] for n, f in files_of(tmp_path / n).items()} for n in ("one", "three"))
    assert one == three


@ray
def test_nothing_written_says_where_or_when(ray_local: None, tmp_path: Path) -> None:
    contents = []
    for name in ("here", "there"):
        plan, corpus = scored(tmp_path / name, [[row(n / 20, n) for n in range(12)]])
        found, _ = select_into(tmp_path / name, plan, corpus, fraction="0.5")
        contents.append({n: f[2] for n, f in files_of(found.url).items()})
        for data in contents[-1].values():
            assert str(tmp_path).encode() not in data
    # Unit ids name their shards, so the two subsets have other names; their bytes are the same.
    part = "part-00000.parquet"
    assert contents[0][part] == contents[1][part]
    one, other = (json.loads(c["_MANIFEST.json"]) for c in contents)
    assert one.pop("select_fingerprint") != other.pop("select_fingerprint")
    assert one == other


@ray
def test_several_parts_are_sorted_across(ray_local: None, tmp_path: Path) -> None:
    size = 2 * subset._ROWS_PER_PART + 1234
    source = np.random.default_rng(0)
    ratios = source.integers(0, 10_000, size) / 10_000
    ids = source.permutation(size)
    rows = [row(float(r), int(i)) for r, i in zip(ratios, ids, strict=True)]
    half = size // 2
    plan, corpus = scored(tmp_path, [rows[:half], rows[half:]], unit_rows=40_000)
    found, names = select_into(tmp_path, plan, corpus, fraction="1")
    assert [(p["path"], p["rows"]) for p in found.manifest["parts"]] == [
        ("part-00000.parquet", 100_000),
        ("part-00001.parquet", 100_000),
        ("part-00002.parquet", 1234),
    ]
    order = np.lexsort((ids, -ratios))
    assert names == [f"0:{i}" if i < half else f"1:{i - half}" for i in order]


# Columns


@ray
def test_columns_and_types_are_kept(ray_local: None, tmp_path: Path) -> None:
    from datetime import datetime

    turns = pa.list_(pa.struct([("who", pa.string()), ("n", pa.int16())]))
    schema = pa.schema(
        [
            ("output", pa.large_string()),
            ("instruction", pa.dictionary(pa.int8(), pa.string())),
            ("turns", turns),
            ("floats", pa.list_(pa.float32())),
            (
                "meta",
                pa.struct([("a", pa.struct([("b", pa.bool_())])), ("c", pa.decimal128(9, 2))]),
            ),
            ("when", pa.timestamp("us", "UTC")),
            ("raw", pa.binary()),
            ("kinds", pa.map_(pa.string(), pa.int32())),
            ("a.dot", pa.uint8()),
            ("nothing", pa.null()),
            ("input", pa.string()),
        ]
    )

    def value(n: int) -> dict[str, Any]:
        return {
            "output": f"out {n}",
            "instruction": f"task {n % 3}" if n != 4 else f"only {n}",
            "turns": [{"who": "x" * i, "n": i} for i in range(n % 3)] if n % 4 else None,
            "floats": [n / 2, None],
            "meta": {"a": {"b": n % 2 == 0}, "c": Decimal(n) / 4} if n % 5 else None,
            "when": datetime.fromisoformat(f"2024-01-01T00:00:{n:02}+00:00"),
            "raw": bytes([n, 0, 255]),
            "kinds": [("k", n)],
            "a.dot": n,
            "nothing": None,
            "input": None,
        }

    values = [value(n) for n in range(12)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, rows in (("a", values[:7]), ("b", values[7:])):
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=4)
    ratios = [0.1, 0.9, 0.3, 0.8, 0.5, 0.7, 0.2, 0.65, 0.55, 0.45, 0.35, 0.25]
    rows = [row(r, n) for n, r in enumerate(ratios)]
    plan, corpus = plan_of(str(folder), tmp_path / "out", [rows[:7], rows[7:]])
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(fraction="0.75"), "fp")
    table = read(found)
    assert table.schema.remove_metadata() == pa.schema([*schema, *SELECTED])
    best = sorted(range(12), key=lambda n: -ratios[n])[:9]
    assert table.select(schema.names).to_pylist() == [values[n] for n in best]


def write_and_open(folder: Path, *tables: pa.Table) -> Corpus:
    folder.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"shard-{number}.parquet")
    return open_corpus(InputConfig(path=str(folder)), str(folder.parent / "out"))


TEXTS = {"instruction": ["a", "b"], "output": ["c", "d"]}


@pytest.mark.parametrize("name", SELECTED.names)
def test_reserved_column_is_refused(tmp_path: Path, name: str) -> None:
    plain = pa.table(TEXTS)
    corpus = write_and_open(tmp_path / "corpus", plain, plain.append_column(name, pa.array([1, 2])))
    with pytest.raises(InputError) as caught:
        subset.output_schema(corpus)
    assert "shard-1.parquet" in str(caught.value)
    assert f"'{name}'" in str(caught.value)


@ray
def test_shards_with_other_columns_are_unified(ray_local: None, tmp_path: Path) -> None:
    tables = [
        pa.table(
            {
                **TEXTS,
                "n": pa.array([1, None], pa.int32()),
                "only_first": ["x", "y"],
                "label": pa.nulls(2),
                "more": pa.array([{"a": 1}, {"a": 2}]),
            }
        ),
        pa.table(
            {
                "label": ["p", "q"],
                "n": pa.array([2**40, 4], pa.int64()),
                **TEXTS,
                "more": pa.array([{"a": 3, "b": "z"}, None]),
                "only_second": pa.array([[1], [2, 3]]),
            }
        ),
    ]
    write_and_open(tmp_path / "corpus", *tables)
    rows = [[row(0.4, 1), row(0.3, 2)], [row(0.9, 3), row(0.1, 4)]]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows)
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(fraction="1"), "fp")
    table = read(found).drop(SELECTED.names)
    assert table.schema.names == [
        "instruction", "output", "n", "only_first", "label", "more", "only_second",
    ]  # fmt: skip
    assert table.schema.field("n").type == pa.int64()
    assert table.drop(["instruction", "output"]).to_pydict() == {
        "n": [2**40, 1, None, 4],
        "only_first": [None, "x", "y", None],
        "label": ["p", None, None, "q"],
        "more": [{"a": 3, "b": "z"}, {"a": 1, "b": None}, {"a": 2, "b": None}, None],
        "only_second": [[1], None, None, [2, 3]],
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1, 2]), pa.array(["x", "y"])),
        (pa.array([1, 2]), pa.array([True, False])),
        (pa.array([[1], [2]]), pa.array([{"a": 1}, {"a": 2}])),
        (pa.array([{"a": 1}] * 2), pa.array([{"a": "x"}] * 2)),
        (pa.array([0, 1], pa.timestamp("us")), pa.array([0, 1], pa.timestamp("us", "UTC"))),
        (pa.array(["x", "y"]).dictionary_encode(), pa.array(["x", "y"])),
    ],
    ids=["int text", "int bool", "list struct", "in a struct", "time zone", "dictionary text"],
)
def test_types_that_do_not_go_together_name_both_shards(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    tables = [pa.table(TEXTS), *(pa.table({**TEXTS, "odd": column}) for column in (one, other))]
    corpus = write_and_open(tmp_path / "corpus", *tables)
    with pytest.raises(InputError) as caught:
        subset.output_schema(corpus)
    said = str(caught.value)
    assert "column 'odd'" in said
    for shard in corpus.shards[1:]:
        assert f"{shard.schema.field('odd').type} in shard {shard.url}" in said


@ray
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1, 2**53 + 1]), pa.array([0.5, 1.5])),
        (pa.array([1, 2]), pa.array([1, 2**64 - 1], pa.uint64())),
    ],
    ids=["int64 as float64", "uint64 as int64"],
)
def test_a_value_that_widening_would_change_is_refused(
    ray_local: None, tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    tables = [pa.table({**TEXTS, "odd": column}) for column in (one, other)]
    write_and_open(tmp_path / "corpus", *tables)
    rows = [[row(0.4, 1), row(0.3, 2)], [row(0.9, 3), row(0.1, 4)]]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows)
    with pytest.raises(InputError, match="column 'odd'") as caught:
        select(plan, corpus, str(tmp_path / "out"), wanted(fraction="1"), "fp")
    said = str(caught.value.cause)  # what the command line prints
    assert said.startswith(f"shard {tmp_path}/corpus/shard-")
    assert not (tmp_path / "out" / "LATEST.json").exists()


@ray
def test_reason_of_a_bad_line_is_no_column_of_the_output(ray_local: None, tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    good = [json.dumps({"instruction": f"0:{n}", "output": "x"}) for n in range(3)]
    source.write_text("\n".join([*good[:2], "{not json", good[2]]) + "\n")
    rows = [row(0.4, 1), row(0.3, 2), MALFORMED, row(0.9, 3)]
    plan, corpus = plan_of(str(source), tmp_path / "out", [rows])
    assert BAD_LINE in corpus.shards[0].schema.names
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(fraction="1"), "fp")
    table = read(found)
    assert table.schema.names == ["instruction", "output", *SELECTED.names]
    assert table["instruction"].to_pylist() == ["0:2", "0:0", "0:1"]


# Manifest and LATEST.json


@ray
def test_latest_points_to_the_manifest_by_a_relative_path(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    found, _ = select_into(tmp_path, plan, corpus, fraction="0.5")
    latest = json.loads((tmp_path / "out" / "LATEST.json").read_bytes())
    name = Path(found.url).name
    assert latest == {"manifest": f"cherry/{name}/_MANIFEST.json"}
    assert Path(found.manifest_url) == tmp_path / "out" / latest["manifest"]


@ray
def test_selection_that_is_there_is_not_written_again(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    first, names = select_into(tmp_path, plan, corpus, fraction="0.5")
    before = files_of(first.url)
    again, names_again = select_into(tmp_path, plan, corpus, fraction="0.50")
    assert (again, names_again) == (first, names)
    assert files_of(first.url) == before


@ray
def test_another_fraction_is_another_directory(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    half, names = select_into(tmp_path, plan, corpus, fraction="0.5")
    before = files_of(half.url)
    quarter, fewer = select_into(tmp_path, plan, corpus, fraction="0.25")
    assert quarter.url != half.url
    assert fewer == names[:3]
    assert files_of(half.url) == before
    latest = tmp_path / "out" / "LATEST.json"
    assert Path(quarter.url).name in latest.read_text()
    select_into(tmp_path, plan, corpus, fraction="0.5")
    assert Path(half.url).name in latest.read_text()


@ray
def test_each_setting_and_the_corpus_name_the_subset(ray_local: None, tmp_path: Path) -> None:
    rows = [row(n / 20, n) for n in range(12)]
    plan, corpus = scored(tmp_path, [rows])
    configs: list[dict[str, Any]] = [
        {}, {"fraction": "0.2"}, {"count": 1}, {"threshold": 0.1}, {"of": "scored"},
        {"min_ifd": 0.1}, {"max_ifd": 0.9}, {"min_response_tokens": 2}, {"by": "ifd_ppl_ratio"},
    ]  # fmt: skip
    urls = {select_into(tmp_path, plan, corpus, **c)[0].url for c in configs}
    other_fp, _ = select(plan, corpus, str(tmp_path / "out"), wanted(), "fp2")
    fewer_units = plan.without({plan.units[-1].unit_id})
    shrunk, _ = select(fewer_units, corpus, str(tmp_path / "out"), wanted(), "fp")
    assert len(urls | {other_fp.url, shrunk.url}) == len(configs) + 2


@ray
def test_manifest_comes_last(ray_local: None, tmp_path: Path) -> None:
    # The second shard is gone when its rows are read: no manifest, and LATEST.json stays.
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)], [row(0.9, 99)]])
    before, _ = select_into(tmp_path, plan, corpus, count=0)
    latest = (tmp_path / "out" / "LATEST.json").read_bytes()
    shard = Path(plan.units[-1].read_url)
    shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(InputError) as caught:
        select_into(tmp_path, plan, corpus, count=3)
    assert str(caught.value.cause).startswith(f"{shard}: there is no such file")
    manifests = list((tmp_path / "out" / "cherry").rglob("_MANIFEST.json"))
    assert manifests == [Path(before.manifest_url)]
    assert (tmp_path / "out" / "LATEST.json").read_bytes() == latest
    shard.with_suffix(".gone").rename(shard)
    assert select_into(tmp_path, plan, corpus, count=3)[1] == ["1:0", "0:11", "0:10"]


@ray
def test_parts_of_a_killed_selection_are_replaced(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    first, names = select_into(tmp_path, plan, corpus, fraction="0.5")
    contents = {n: f[2] for n, f in files_of(first.url).items()}
    Path(first.manifest_url).unlink()
    Path(first.url, "part-00000.parquet").write_bytes(b"PAR1 half of a part")
    again, names_again = select_into(tmp_path, plan, corpus, fraction="0.5")
    assert (again.url, names_again) == (first.url, names)
    assert {n: f[2] for n, f in files_of(first.url).items()} == contents


@ray
def test_missing_part_is_named(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    path = Path(plan.part_url(plan.units[2]))
    audited = audit(plan)
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        selection.select(plan, corpus, str(tmp_path / "out"), wanted(count=3), "fp", audited)


# Other bytes


@ray
def test_parts_that_change_while_they_are_selected_from_are_noticed(
    ray_local: None, tmp_path: Path
) -> None:
    plan, corpus = scored(tmp_path, [[row(0.1 * n, n) for n in range(1, 9)]])
    audited = audit(plan)
    changed = Path(plan.part_url(plan.units[1]))
    table = pq.read_table(changed)
    pq.write_table(table.replace_schema_metadata({"cherry.device": "another"}), changed)
    job = (plan, corpus, str(tmp_path / "out"), wanted(fraction="0.5"), "fp")
    with pytest.raises(StorageError, match=f"1 parts changed.*{plan.units[1].unit_id}"):
        selection.select(*job, audited)
    assert not list(tmp_path.glob("out/cherry/*/_MANIFEST.json"))
    assert not (tmp_path / "out/LATEST.json").exists()


@ray
def test_the_same_units_with_other_bytes_make_another_subset(
    ray_local: None, tmp_path: Path
) -> None:
    plan, corpus = scored(tmp_path, [[row(0.1 * n, n) for n in range(1, 9)]])
    job = (plan, corpus, str(tmp_path / "out"), wanted(fraction="0.5"), "fp")
    first, _ = select(*job)
    again, survey = select(*job)
    assert (again.url, survey) == (first.url, None)  # made once
    part = Path(plan.part_url(plan.units[0]))
    table = pq.read_table(part)
    pq.write_table(table.replace_schema_metadata({"cherry.device": "another"}), part)
    other, _ = select(*job)
    assert other.url != first.url
    assert other.manifest["score_parts"] != first.manifest["score_parts"]
    assert other.manifest["parts"] == first.manifest["parts"]  # nothing else differs here
