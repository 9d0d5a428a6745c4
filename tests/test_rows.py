"""Rows of a shard by their number."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.rows import take_rows

NUM_ROWS = 50


@pytest.fixture(scope="module", params=[1, 7, 50])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of fifty rows with row groups of several sizes."""
    path = tmp_path_factory.mktemp("rows") / "shard.parquet"
    column = pa.array([f"k{n % 5}" for n in range(NUM_ROWS)]).dictionary_encode()
    table = pa.table({"n": range(NUM_ROWS), "kind": column, "other": range(NUM_ROWS)})
    pq.write_table(table, path, row_group_size=request.param)
    return str(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sets(st.integers(0, NUM_ROWS - 1)).map(sorted))
def test_any_rows(shard: str, rows: list[int]) -> None:
    table = take_rows(shard, np.array(rows, np.int64), {"n", "kind", "absent"})
    assert table.to_pydict() == {"n": rows, "kind": [f"k{n % 5}" for n in rows]}
    assert pa.types.is_dictionary(table.schema.field("kind").type)


def test_rows_that_are_not_there_are_named(shard: str) -> None:
    with pytest.raises(InputError, match="got 50 rows, expected more than 50: it changed"):
        take_rows(shard, np.array([3, NUM_ROWS]), {"n"})


def test_a_shard_of_no_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    table = take_rows(str(tmp_path / "empty.parquet"), np.empty(0, np.int64), {"n"})
    assert table.to_pydict() == {"n": []}
