"""Accounting: a part that does not hold exactly its unit's rows is named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.accounting import tally
from pipeline.errors import AccountingError, InputError
from pipeline.schemas import PART
from pipeline.units import Plan, Unit, make_plan

pytestmark = pytest.mark.ray


@pytest.fixture
def plan(tmp_path: Path, corpus: Path) -> Plan:
    """Eight units of the 40-row corpus, each with a sound part: row 0 of each unit is empty."""
    from pipeline.config import InputConfig
    from pipeline.inputs import open_corpus

    opened = open_corpus(InputConfig(path=str(corpus)), str(tmp_path / "out"))
    planned = make_plan(opened, str(tmp_path / "out"), "fp", 6, 1, None)
    for unit in planned.units:
        write_part(planned, unit, list(range(unit.start, unit.stop)))
    return planned


def write_part(plan: Plan, unit: Unit, row_indices: list[int]) -> None:
    path = Path(plan.part_url(unit))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row_index": index, "status": "ok" if index > unit.start else "empty_response"}
        for index in row_indices
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PART), path)


def test_statuses_are_counted_from_the_parts(ray_local: None, plan: Plan) -> None:
    assert [(u.start, u.stop) for u in plan.units][:3] == [(0, 5), (5, 10), (10, 15)]
    assert tally(plan, list(plan.units)) == {"ok": 32, "empty_response": 8}


def test_only_the_units_given_are_counted(ray_local: None, plan: Plan) -> None:
    assert tally(plan, list(plan.units[:2])) == {"ok": 8, "empty_response": 2}
    assert tally(plan, []) == {}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([5, 6, 7, 8], id="last lost"),
        pytest.param([5, 7, 8, 9], id="middle lost"),
        pytest.param([5, 6, 7, 8, 9, 9], id="doubled"),
        pytest.param([5, 6, 7, 8, 8], id="one lost, one doubled"),
        pytest.param([6, 7, 8, 9, 10], id="shifted"),
        pytest.param([0, 1, 2, 3, 4], id="counted from the unit, not the shard"),
        pytest.param([6, 5, 7, 8, 9], id="swapped"),
        pytest.param([5, 6, 7, 8, None], id="null"),
        pytest.param([], id="empty"),
    ],
)
def test_wrong_rows_are_an_error_that_names_the_part(
    ray_local: None, plan: Plan, rows: list[int]
) -> None:
    unit = plan.units[1]
    path = Path(plan.part_url(unit))
    table = pa.table({"row_index": pa.array(rows, pa.int64()), "status": ["ok"] * len(rows)})
    pq.write_table(table, path)
    with pytest.raises(AccountingError, match=path.name) as caught:
        tally(plan, list(plan.units))
    cause = str(caught.value.cause)  # what the command line prints
    assert "expected rows 5 to 9" in cause
    assert f"got {len(rows)} rows" in cause


def test_missing_part_is_named(ray_local: None, plan: Plan) -> None:
    path = Path(plan.part_url(plan.units[3]))
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        tally(plan, list(plan.units))


def test_truncated_part_is_named(ray_local: None, plan: Plan) -> None:
    path = Path(plan.part_url(plan.units[3]))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=path.name):
        tally(plan, list(plan.units))
