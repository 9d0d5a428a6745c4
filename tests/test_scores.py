"""Keys, bins, and which rows are eligible."""

import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_parquet
from hypothesis import given
from hypothesis import strategies as st
from scored_corpus import EDGES, FINITE, wanted

from pipeline import listing, storage
from pipeline.config_select import Order
from pipeline.layouts import Columns
from pipeline.parts import to_parquet
from pipeline.schemas import PART
from pipeline.scores import (
    NUM_BINS,
    Scores,
    Task,
    encode,
    from_keys,
    read_groups,
    read_scores,
    reader_of,
    tasks,
    to_bins,
    to_keys,
)
from pipeline.units import Plan, Unit


def keys_of(*ratios: float, order: Order = "ascending") -> list[int]:
    return to_keys(np.array(ratios, np.float64), order).tolist()


def test_keys_by_hand() -> None:
    ascending = [
        0x400FFFFFFFFFFFFF,
        0x8000000000000000,
        0xBFF0000000000000,
        0xFFF0000000000000,
    ]
    ratios = (-1.0, 0.0, 1.0, math.inf)
    assert keys_of(*ratios) == ascending
    assert keys_of(*ratios, order="descending") == [key ^ (2**64 - 1) for key in ascending]


def test_bins_are_fine_where_ratios_lie() -> None:
    bins = to_bins(to_keys(np.linspace(0.5, 1.0, 100_000, endpoint=False), "descending"))
    assert np.unique(bins).size == 256
    assert np.all(np.diff(bins) <= 0)
    assert to_bins(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0, NUM_BINS - 1]


def test_zeros_have_one_key() -> None:
    assert len(set(keys_of(0.0, -0.0))) == 1


@given(st.lists(FINITE | EDGES | st.sampled_from([math.inf, -math.inf]), min_size=2))
def test_keys_have_the_order_of_their_ratios(ratios: list[float]) -> None:
    keys = keys_of(*ratios)
    assert [k ^ (2**64 - 1) for k in keys] == keys_of(*ratios, order="descending")
    for one, key in zip(ratios, keys, strict=True):
        for other, other_key in zip(ratios, keys, strict=True):
            assert (one < other) == (key < other_key)
            assert (one == other) == (key == other_key)


@given(st.lists(FINITE | EDGES), st.sampled_from(["ascending", "descending"]))
def test_keys_turn_back_into_ratios(ratios: list[float], order: Order) -> None:
    back = from_keys(to_keys(np.array(ratios, np.float64), order), order).tolist()
    assert [struct.pack("d", r + 0.0) for r in ratios] == [struct.pack("d", r) for r in back]


def read_part(folder: Path, *ratios: float | None, tokens: int = 5, **config: Any) -> Scores:
    """The scores of one part, whose rows have status ok."""
    size = len(ratios)
    columns = {
        "status": pa.array(["ok"] * size).cast(PART.field("status").type),
        "ifd_loss_ratio": pa.array(ratios, pa.float64()),
        "num_response_tokens": pa.array([tokens] * size, pa.int32()),
    }
    absent = {field.name: pa.nulls(size, field.type) for field in PART}
    unit = Unit("u", "shard", "shard", Columns("alpaca", {}), 0, size, "fp", "fp")
    Path(unit.part_url(str(folder))).write_bytes(to_parquet(pa.table(absent | columns)))
    return read_scores(Task(0, (unit,), str(folder)), wanted(**config), {None: 0})


def test_what_is_no_number_is_never_eligible(tmp_path: Path) -> None:
    ratios = (0.5, math.nan, -math.nan, None, math.inf, -math.inf, 5e-324, -0.0)
    scores = read_part(tmp_path, *ratios, max_ifd=None)
    assert scores.eligible.tolist() == [True, False, False, False, True, True, True, True]
    assert scores.rejected == Counter(not_a_number=3)
    scores = read_part(tmp_path, *ratios, max_ifd=1.0, min_ifd=0.0)
    assert scores.eligible.tolist() == [True, False, False, False, False, False, True, True]
    assert scores.rejected == Counter(not_a_number=3, at_or_over_max_ifd=1, under_min_ifd=1)


def test_the_first_reason_counts(tmp_path: Path) -> None:
    scores = read_part(tmp_path, 1.5, math.nan, tokens=1, min_response_tokens=2)
    assert scores.rejected == Counter(too_few_tokens=1, not_a_number=1)
    assert scores.rows_by_status == Counter(ok=2)


def test_codes_go_on_from_those_that_are_known() -> None:
    codes: dict[str | None, int] = {"b": 0}
    assert encode(pa.array(["a", None, "b", "a"]), codes).tolist() == [1, 2, 0, 1]
    assert encode(pa.array([None, None], pa.string()), codes).tolist() == [2, 2]
    assert codes == {"b": 0, "a": 1, None: 2}
    assert encode(pa.array([], pa.string()), codes).tolist() == []


def test_rows_of_a_task_are_located() -> None:
    columns = Columns("alpaca", {})
    ranges = [(10, 12), (12, 15), (0, 1)]
    units = tuple(Unit("u", "s", "s", columns, a, b, "fp", "fp") for a, b in ranges)
    where = Task(7, units, "scores").locate(np.arange(6))
    assert [array.tolist() for array in where] == [[7, 7, 8, 8, 8, 9], [10, 11, 12, 13, 14, 0]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([10], [1]), ([300_000] * 3, [2, 1]), ([1] * 150, [64, 64, 22]), ([1] * 32_768, [256] * 128)],
    ids=["one", "large", "small", "many small"],
)
def test_tasks_are_neighbouring_units(sizes: list[int], expected: list[int]) -> None:
    class Sized:
        def __init__(self, rows: int) -> None:
            self.num_rows = rows

    units: Any = tuple(Sized(rows) for rows in sizes)
    cut = list(tasks(Plan(units, "scores", {})))
    assert [len(task.units) for task in cut] == expected
    assert [task.first_unit for task in cut] == [0, *np.cumsum(expected)[:-1].tolist()]
    assert [unit for task in cut for unit in task.units] == list(units)


@pytest.mark.parametrize(
    ("url", "sizes", "several"),
    [
        ("s3://b/x", [1000, 2000], True),
        ("s3://b/x", [1000, 9 << 20], False),  # each reader would hold a row group
        ("/b/x", [1000, 2000], False),
    ],
)
def test_small_shards_of_a_store_are_read_several_at_a_time(
    url: str, sizes: list[int], several: bool
) -> None:
    columns = Columns("alpaca", {})
    units = [Unit("u", url, url, columns, 0, 1, "fp", "fp", size, "v") for size in sizes]
    assert (reader_of(units) is storage.several) == several


def test_rows_of_a_shard_without_the_column_have_no_group(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"n": 1, "source": "web"}, {"n": 2, "source": "code"}])
    write_parquet(tmp_path / "b.parquet", [{"n": 3}])
    columns = Columns("alpaca", {})
    files = zip(listing.list_objects(str(tmp_path)), (2, 1), strict=True)
    units = tuple(
        Unit("u", file.url, file.url, columns, 0, rows, "fp", "fp", file.size, file.version)
        for file, rows in files
    )
    groups = read_groups(Task(0, units, "nowhere"), "source")
    assert groups.to_pylist() == ["web", "code", None]
