"""Rows of a shard by their number."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import listing, tokenising
from pipeline import rows as rows_module
from pipeline.config import InputConfig
from pipeline.errors import ChangedError, InputError, StorageError
from pipeline.inputs import open_corpus
from pipeline.layouts import Columns
from pipeline.listing import ObjectInfo
from pipeline.rows import plan_reads, read_units, take_rows
from pipeline.units import Unit, make_plan

NUM_ROWS = 50
COLUMNS = Columns("prompt_completion", {"prompt": "n"})


@pytest.fixture(scope="module", params=[1, 7, 50])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ObjectInfo:
    """Shards of fifty rows with row groups of several sizes."""
    return write_shard(tmp_path_factory.mktemp("rows") / "shard.parquet", request.param)


def write_shard(path: Path, row_group_size: int = 50) -> ObjectInfo:
    column = pa.array([f"k{n % 5}" for n in range(NUM_ROWS)]).dictionary_encode()
    table = pa.table({"n": range(NUM_ROWS), "kind": column, "other": range(NUM_ROWS)})
    pq.write_table(table, path, row_group_size=row_group_size)
    return listing.list_objects(str(path))[0]


def unit_of(file: ObjectInfo, start: int, stop: int) -> Unit:
    size_and_version = file.size, file.version
    return Unit("u", file.url, file.url, COLUMNS, start, stop, "fp", "fp", *size_and_version)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sets(st.integers(0, NUM_ROWS - 1)).map(sorted))
def test_any_rows(shard: ObjectInfo, rows: list[int]) -> None:
    table = take_rows(shard, np.array(rows, np.int64), {"n", "kind", "absent"})
    assert table.to_pydict() == {"n": rows, "kind": [f"k{n % 5}" for n in rows]}
    assert pa.types.is_dictionary(table.schema.field("kind").type)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ends=st.sets(st.integers(0, NUM_ROWS)).map(sorted), batch=st.sampled_from([1, 3, 2000]))
def test_any_units_in_one_sweep(shard: ObjectInfo, ends: list[int], batch: int) -> None:
    ranges = list(itertools.pairwise(ends))[::2]  # with gaps: units that are done already
    if not ranges:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_ROWS_PER_BATCH", batch)
        tables = list(read_units([unit_of(shard, *each) for each in ranges]))
    assert [t["n"].to_pylist() for t in tables] == [list(range(*each)) for each in ranges]


def test_a_row_group_is_read_once_for_all_units_of_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_shard(tmp_path / "shard.parquet")
    monkeypatch.setattr(rows_module, "_ROWS_PER_BATCH", 5)
    seen = []
    batches = pq.ParquetFile.iter_batches

    def count(*given: Any, **options: Any) -> Iterator[Any]:
        for batch in batches(*given, **options):
            seen.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    tables = list(read_units([unit_of(file, n, n + 5) for n in range(0, NUM_ROWS, 5)]))
    assert [len(table) for table in tables] == [5] * 10
    assert seen == [5] * 10


def test_long_rows_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table(
        {"n": range(40), "long": [f"{n:010000}" for n in range(40)], "more": range(40)}
    )
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=20, use_dictionary=False)
    file = listing.list_objects(str(tmp_path / "shard.parquet"))[0]
    monkeypatch.setattr(rows_module, "_BYTES_PER_BATCH", 50_000)
    most = []
    batches = pq.ParquetFile.iter_batches

    def note(self: Any, size: int, **options: Any) -> Iterator[Any]:
        most.append(size)
        return batches(self, size, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    for columns in ({"n"}, {"n", "long"}):
        assert take_rows(file, np.array([1, 19, 20, 39]), columns)["n"].to_pylist() == [
            1,
            19,
            20,
            39,
        ]
    assert most == [2000, 2000, 4, 4]


def test_neighbours_in_a_shard_are_read_together(tmp_path: Path) -> None:
    one, other = (write_shard(tmp_path / f"{name}.parquet") for name in ("a", "b"))
    units = [unit_of(file, n, n + 5) for file in (one, other) for n in range(0, NUM_ROWS, 5)]

    def sizes(at_least: int, units: list[Unit] = units) -> list[int]:
        reads = plan_reads(units, at_least)
        assert [unit for read in reads for unit in read] == units
        assert all(len({unit.read_url for unit in read}) == 1 for read in reads)
        return [len(read) for read in reads]

    assert sizes(1) == [10, 10]
    assert sizes(5) == [4, 4, 2, 4, 4, 2]
    assert sizes(20) == sizes(1000) == [1] * 20
    assert sizes(1, units[9::-1]) == [1] * 10  # a sweep never goes back
    assert sizes(1, [unit_of(one, n, n + 1) for n in range(130)]) == [64, 64, 2]
    wide = [unit_of(one, n, n + 40_000) for n in range(0, 200_000, 40_000)]
    assert sizes(1, wide) == [2, 2, 1]
    assert plan_reads([], 8) == []


def test_columns_that_the_shard_has_not_are_no_rows(shard: ObjectInfo) -> None:
    table = take_rows(shard, np.array([3, 5]), {"absent"})
    assert table.schema.names == []


def test_rows_that_are_not_there_are_named(shard: ObjectInfo) -> None:
    with pytest.raises(InputError, match="got 50 rows, expected more than 50: it changed"):
        take_rows(shard, np.array([3, NUM_ROWS]), {"n"})


def test_rows_of_a_shard_that_was_overwritten_are_refused(tmp_path: Path) -> None:
    """They would get the scores of the rows that were there before."""
    file = write_shard(tmp_path / "shard.parquet", 7)
    tables = read_units([unit_of(file, 0, 5), unit_of(file, 5, 50)])
    assert len(next(tables)) == 5
    write_shard(tmp_path / "new.parquet", 50)
    (tmp_path / "new.parquet").replace(file.url)
    with pytest.raises(InputError, match=r"overwritten while it was in use: got [\d,]+ bytes"):
        next(tables)
    with pytest.raises(ChangedError, match="Put new data beside"):
        take_rows(file, np.array([3]), {"n"})
    with pytest.raises(StorageError, match="What is scored is kept"):  # no bad shard, to be skipped
        tokenising.read(unit_of(file, 0, 5))
    (tmp_path / "shard.parquet").unlink()
    with pytest.raises(InputError, match="no such file"):
        take_rows(file, np.array([3]), {"n"})


def test_a_shard_of_no_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    file = ObjectInfo(str(tmp_path / "empty.parquet"), 0, "")
    assert take_rows(file, np.empty(0, np.int64), {"n"}).to_pydict() == {"n": []}


def test_a_tensor_in_another_order_is_taken(tmp_path: Path) -> None:
    """Of which pyarrow makes no empty array as it does of other types."""
    values = np.arange(12).reshape(3, 2, 2)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    pq.write_table(pa.table({"n": tensors}), tmp_path / "shard.parquet")
    file = listing.list_objects(str(tmp_path / "shard.parquet"))[0]
    found = take_rows(file, np.array([0, 2]), {"n"})["n"].combine_chunks()
    np.testing.assert_array_equal(found.to_numpy_ndarray(), values[[0, 2]])


def test_a_shard_that_is_being_written_over_is_no_bad_one(tmp_path: Path) -> None:
    """Half of its new bytes are there, which nothing can read, and `skip` would leave it out."""
    shard = tmp_path / "in" / "a.parquet"
    shard.parent.mkdir()
    pq.write_table(pa.table({"instruction": ["a"] * 99, "output": ["b"] * 99}), shard)
    output = str(tmp_path / "out")
    corpus = open_corpus(InputConfig(path=str(shard)), output)
    (unit,) = make_plan(corpus, output, "fp", 100, 1, None).units
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(StorageError, match="overwritten while it was in use"):
        tokenising.read(unit)
