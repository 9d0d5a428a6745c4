"""Selection against an oracle that sorts every row in one process."""

import itertools
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scored_corpus import (
    EMPTY,
    HARD_IDS,
    MALFORMED,
    RATIOS,
    Row,
    files_of,
    read,
    row,
    scored,
    select,
    select_into,
    wanted,
)

from pipeline import gathering, scores, selection, subset, survey
from pipeline.accounting import audit
from pipeline.budgets import UNLIMITED, asked_rows
from pipeline.errors import InputError, StorageError
from pipeline.inputs import Corpus
from pipeline.schemas import SELECTED
from pipeline.units import Plan

ray = pytest.mark.ray
WITH_RAY = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a corpus of millions of rows: several tasks, ranges of ranks, and extracts."""
    monkeypatch.setattr(scores, "_ROWS_PER_TASK", 30)
    monkeypatch.setattr(survey, "_KEEP_LEAST", 1)  # some tasks must look again
    monkeypatch.setattr(gathering, "ROWS_PER_RANGE", 24)
    monkeypatch.setattr(subset, "_BYTES_PER_EXTRACT", 2_000)


# The oracle


@dataclass(frozen=True)
class Expected:
    """What a selection must give."""

    names: list[str]
    levels: list[int]
    """The smallest budget that each row belongs to."""
    duplicates: int
    eligible: int
    by_level: list[dict[str, Any]]
    """Rows, cut and ties of each budget, added up over groups."""


def expect(shards: Sequence[Sequence[Row]], **config: Any) -> Expected:
    """Sort everything, drop later copies, and take from each group what is asked."""
    chosen = wanted(**config)
    sign = -1 if chosen.order == "descending" else 1
    rows = [
        (sign * r.ratio, r.sample_id, shard, index, r)
        for shard, shard_rows in enumerate([s for s in shards if s])
        for index, r in enumerate(shard_rows)
        if r.status == "ok" and r.ratio is not None
    ]
    low = -math.inf if chosen.min_ifd is None else chosen.min_ifd
    high = math.inf if chosen.max_ifd is None else chosen.max_ifd
    eligible = [
        e for e in sorted(rows, key=lambda e: e[:4])
        if low <= e[4].ratio < high and e[4].tokens >= chosen.min_response_tokens
    ]  # fmt: skip

    def group_of(r: Row) -> str | None:
        return r.group if chosen.group_by else None

    everything = [r for s in shards for r in s]
    groups = sorted({group_of(r) for r in everything}, key=lambda g: (g is None, g or ""))
    sizes = {
        "all": Counter(group_of(r) for r in everything),
        "scored": Counter(group_of(e[4]) for e in rows),
        "eligible": Counter(group_of(e[4]) for e in eligible),
    }
    of, most = ([sizes[name][g] for g in groups] for name in (chosen.of, "eligible"))
    asked = asked_rows(chosen, groups, np.array(of), np.array(most)).tolist()
    limit = math.inf if chosen.threshold is None else sign * chosen.threshold
    considered = [e for e in eligible if e[0] <= limit]
    seen: set[bytes] = set()
    unique: dict[Any, list[Any]] = {group: [] for group in groups}
    copies: dict[Any, list[Any]] = {group: [] for group in groups}
    for entry in considered:
        is_copy = chosen.duplicates == "drop" and entry[1] in seen
        (copies if is_copy else unique)[group_of(entry[4])].append(entry)
        seen.add(entry[1])
    kept = sorted(
        (entry[:4], next(n for n, some in enumerate(asked) if place < some[g]))
        for g, group in enumerate(groups)
        for place, entry in enumerate(unique[group])
        if place < asked[-1][g]
    )
    duplicates = 0
    for g, group in enumerate(groups):
        last = unique[group][: asked[-1][g]][-1:]
        full = len(unique[group]) >= asked[-1][g]
        duplicates += sum(not full or (bool(last) and c[:4] < last[0][:4]) for c in copies[group])
    by_level = []
    totals = [None if UNLIMITED in some else sum(some) for some in asked]
    if chosen.quotas == "proportional":
        totals = [math.floor(Fraction(f) * sum(of)) for f in chosen.fractions] or [chosen.count]
    for some, total in zip(asked, totals, strict=True):
        ends = [(u[: some[g]], u) for g, u in enumerate(unique.values())]
        ties = [(taken, [e for e in u if e[0] == taken[-1][0]]) for taken, u in ends if taken]
        by_level.append(
            {
                "asked_rows": total,
                "selected_rows": sum(len(taken) for taken, _ in ends),
                "cut": sign * max(t[-1][0] for t, _ in ties) if ties else None,
                "rows_at_cut": sum(len(tied) for _, tied in ties),
                "selected_at_cut": sum(len([e for e in t if e in tied]) for t, tied in ties),
            }
        )
    return Expected(
        names=[f"{shard}:{index}" for (_, _, shard, index), _ in kept],
        levels=[level for _, level in kept],
        duplicates=duplicates,
        eligible=len(eligible),
        by_level=by_level,
    )


def check(
    folder: Path, shards: Sequence[Sequence[Row]], plan: Plan, corpus: Corpus, **config: Any
) -> list[str]:
    """Select, compare with the oracle, and give back the rows' names."""
    found, names = select_into(folder, plan, corpus, **config)
    expected = expect(shards, **config)
    manifest = found.manifest
    assert names == expected.names
    assert {name: manifest[name] for name in expected.by_level[-1]} == expected.by_level[-1]
    fractions = wanted(**config).fractions
    assert manifest["budgets"] == [
        {"fraction": f, **level} for f, level in zip(fractions, expected.by_level, strict=False)
    ]
    if len(fractions) > 1 and config.get("group_by") and names:
        smallest = [float(fractions[level]) for level in expected.levels]
        assert read(found)["smallest_fraction"].to_pylist() == smallest
    assert manifest["duplicate_rows"] == expected.duplicates
    assert manifest["eligible_rows"] == expected.eligible
    assert manifest["rows"] == sum(len(s) for s in shards)
    statuses = Counter(r.status for s in shards for r in s)
    assert manifest["rows_by_status"] == statuses
    assert sum(manifest["rejected_rows"].values()) == statuses["ok"] - expected.eligible
    for name in ("rows", "eligible_rows", "selected_rows", "duplicate_rows", "rows_at_cut"):
        if manifest["groups"]:
            assert sum(group[name] for group in manifest["groups"]) == manifest[name]
    return names


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
    outcome = {
        "asked_rows": 4, "selected_rows": 4, "cut": 0.2, "rows_at_cut": 1, "selected_at_cut": 1,
    }  # fmt: skip
    assert found.manifest == {
        "score_fingerprint": "fp",
        "select_fingerprint": Path(found.url).name,
        "settings": {
            "by": "ifd_loss_ratio", "order": "descending", "fractions": ["0.5"], "count": None,
            "threshold": None, "of": "all", "min_ifd": None, "max_ifd": 1.0,
            "min_response_tokens": 1, "duplicates": "drop", "group_by": None, "quotas": "each",
            "floor": 0, "format": "parquet", "rows_per_part": 50_000,
        },
        "rows": 8,
        "skipped_shards": 0,
        "rows_by_status": {"empty_response": 1, "malformed": 1, "ok": 6},
        "eligible_rows": 5,
        "rejected_rows": {"at_or_over_max_ifd": 1},
        "duplicate_rows": 1,
        **outcome,
        "budgets": [{"fraction": "0.5", **outcome}],
        "groups": [],
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
    {"count": 37, "order": "ascending"},
    {"threshold": 0.5, "order": "ascending"},
    {"count": 120, "duplicates": "keep"},
    {"fractions": ["0.02", "0.29", "0.05", "0.5"]},
    {"fractions": ["0.1", "0.3"], "group_by": "source"},
    {"count": 20, "group_by": "source", "duplicates": "keep", "order": "ascending"},
    {"threshold": 0.6, "group_by": "source"},
    {"fractions": ["0.05", "0.3"], "group_by": "source", "quotas": "proportional", "floor": 3},
    {"group_by": "source", "quotas": {"web": 7, "null": 0.1, "*": 1.0}},
]


@ray
@pytest.mark.parametrize("kind", ["random", "tied", "skewed", "equal", "ascending", "adversarial"])
def test_selection_is_the_oracles(
    ray_local: None, many_tasks: None, tmp_path: Path, kind: str
) -> None:
    source = random.Random(1)
    # One in four ids has copies, with other ratios; one in ten rows has no score.
    rows = [
        row(ratio, source.randrange(1, 150) if source.random() < 0.25 else 1000 + n,
            source.randrange(1, 9), source.choice(["web", "code", "code", "code", None]))
        for n, ratio in enumerate(make_ratios(kind, 270))
    ] + [EMPTY, MALFORMED] * 15  # fmt: skip
    source.shuffle(rows)
    shards = [rows[:101], rows[101:102], rows[102:]]
    plan, corpus = scored(tmp_path, shards, unit_rows=4)
    for budget in BUDGETS:
        check(tmp_path, shards, plan, corpus, **budget)


def can_be_meant(select: dict[str, Any]) -> bool:
    """Whether the config takes it: not min_ifd over max_ifd, nor a threshold that no row passes."""
    try:
        wanted(**select)
    except ValidationError:
        return False
    return True


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
    assume(can_be_meant(budget | rules))
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
    assume(can_be_meant(budget))
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
    _, survey = select(plan, corpus, str(tmp_path / "out"), wanted())
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
        select(plan, corpus, str(tmp_path / name), wanted(fraction="0.3"))
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
selection.select(plan, corpus, sys.argv[2], settings, audit(plan))
"""


@ray
def test_number_of_workers_changes_no_byte(ray_local: None, tmp_path: Path) -> None:
    source = random.Random(4)
    rows = [row(source.choice([0.3, 0.6, 0.9]), source.randrange(300)) for _ in range(400)]
    plan, corpus = scored(tmp_path, [rows[:150], rows[150:]], unit_rows=4)
    job = (plan, corpus, wanted(fraction="0.2"))
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    select(*job[:2], str(tmp_path / "three"), job[2])
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
    size = 2 * 10_000 + 1234
    source = np.random.default_rng(0)
    ratios = source.integers(0, 10_000, size) / 10_000
    ids = source.permutation(size)
    rows = [row(float(r), int(i)) for r, i in zip(ratios, ids, strict=True)]
    half = size // 2
    plan, corpus = scored(tmp_path, [rows[:half], rows[half:]], unit_rows=4_000)
    found, names = select_into(tmp_path, plan, corpus, fraction="1", rows_per_part=10_000)
    assert [(p["path"], p["rows"]) for p in found.manifest["parts"]] == [
        ("part-00000.parquet", 10_000),
        ("part-00001.parquet", 10_000),
        ("part-00002.parquet", 1234),
    ]
    order = np.lexsort((ids, -ratios))
    assert names == [f"0:{i}" if i < half else f"1:{i - half}" for i in order]


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
    elsewhere = replace(plan, scores_url=f"{plan.scores_url}2")
    shutil.copytree(plan.scores_url, elsewhere.scores_url)
    other_fp, _ = select(elsewhere, corpus, str(tmp_path / "out"), wanted())
    fewer_units = plan.without({plan.units[-1].unit_id})
    shrunk, _ = select(fewer_units, corpus, str(tmp_path / "out"), wanted())
    assert len(urls | {other_fp.url, shrunk.url}) == len(configs) + 2


@ray
def test_a_selection_whose_parts_were_deleted_is_written_again(
    ray_local: None, tmp_path: Path
) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    found, chosen = select_into(tmp_path, plan, corpus, count=3)
    part = Path(found.url, found.manifest["parts"][0]["path"])
    content = part.read_bytes()
    part.unlink()
    again, chosen_again = select_into(tmp_path, plan, corpus, count=3)
    assert (again, chosen_again) == (found, chosen)
    assert part.read_bytes() == content


@ray
@pytest.mark.parametrize("damaged", [b"", b'{"parts": [', b"[]", b"7"])
def test_a_damaged_manifest_is_named(ray_local: None, tmp_path: Path, damaged: bytes) -> None:
    plan, corpus = scored(tmp_path, [[row(n / 20, n) for n in range(12)]])
    found, _ = select_into(tmp_path, plan, corpus, count=3)
    Path(found.manifest_url).write_bytes(damaged)
    with pytest.raises(StorageError, match=f"{found.manifest_url}: it is damaged.*Delete it"):
        select_into(tmp_path, plan, corpus, count=3)


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
        selection.select(plan, corpus, str(tmp_path / "out"), wanted(count=3), audited)


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
    job = (plan, corpus, str(tmp_path / "out"), wanted(fraction="0.5"))
    with pytest.raises(StorageError, match=f"1 part changed.*{plan.units[1].unit_id}"):
        selection.select(*job, audited)
    assert not list(tmp_path.glob("out/cherry/*/_MANIFEST.json"))
    assert not (tmp_path / "out/LATEST.json").exists()


@ray
def test_the_same_units_with_other_bytes_make_another_subset(
    ray_local: None, tmp_path: Path
) -> None:
    plan, corpus = scored(tmp_path, [[row(0.1 * n, n) for n in range(1, 9)]])
    job = (plan, corpus, str(tmp_path / "out"), wanted(fraction="0.5"))
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
