"""Accounting: rows are counted from the parts themselves, and parts nobody touched only once."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import accounting
from pipeline.accounting import audit
from pipeline.errors import AccountingError, StorageError
from pipeline.parts import to_parquet
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


def write_part(plan: Plan, unit: Unit, row_indices: list[int | None], last: str = "ok") -> None:
    path = Path(plan.part_url(unit))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"row_index": index, "status": "ok"} for index in row_indices]
    rows[0]["status"], rows[-1]["status"] = "empty_response", last
    pq.write_table(pa.Table.from_pylist(rows, schema=PART), path)


def test_statuses_are_counted_from_the_parts(ray_local: None, plan: Plan) -> None:
    assert [(u.start, u.stop) for u in plan.units][:3] == [(0, 5), (5, 10), (10, 15)]
    assert audit(plan).rows_by_status == {"ok": 32, "empty_response": 8}


def test_units_of_skipped_shards_are_not_counted(ray_local: None, plan: Plan) -> None:
    skipped = plan.units[3]
    os.unlink(plan.part_url(skipped))
    rest = plan.without({skipped.unit_id})
    assert audit(rest).rows_by_status == {"ok": 32 - 4, "empty_response": 7}
    assert rest.rows_by_shard[skipped.shard_url] == 15 - skipped.num_rows


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
    ],
)
def test_a_part_without_exactly_its_rows_is_named(
    ray_local: None, plan: Plan, rows: list[int | None]
) -> None:
    write_part(plan, plan.units[1], rows)
    with pytest.raises(AccountingError, match=plan.units[1].unit_id) as caught:
        audit(plan)
    assert f"got {len(rows)} rows, expected rows 5 to 9" in str(caught.value)
    assert "Delete the part and run again" in str(caught.value)


def test_the_part_of_another_unit_is_named(ray_local: None, plan: Plan) -> None:
    """Of as many rows with the same numbers, in another shard."""
    one, other = plan.units[0], next(u for u in plan.units[1:] if not u.start)
    table = pq.read_table(plan.part_url(other), schema=PART)
    labelled = table.replace_schema_metadata({"cherry.unit": other.to_json()})
    Path(plan.part_url(other)).write_bytes(to_parquet(labelled))
    audit(plan)
    Path(plan.part_url(one)).write_bytes(to_parquet(labelled))
    with pytest.raises(
        AccountingError,
        match=f"{one.unit_id}.*got the part of unit {other.unit_id}, of shard {other.shard_url}",
    ):
        audit(plan)


def test_a_truncated_part_never_counts(ray_local: None, plan: Plan) -> None:
    audit(plan)  # the ledger knows it whole
    path = Path(plan.part_url(plan.units[2]))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AccountingError, match=f"{plan.units[2].unit_id}.*not readable as Parquet"):
        audit(plan)


def test_a_flipped_bit_of_a_score_is_noticed(ray_local: None, plan: Plan) -> None:
    path = Path(plan.part_url(plan.units[2]))
    ratios = pa.array([0.1 * n for n in range(1, 6)])
    table = pq.read_table(path, schema=PART)
    at = table.schema.names.index("ifd_loss_ratio")
    path.write_bytes(to_parquet(table.set_column(at, PART.field(at), [ratios])))
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(at)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AccountingError, match=f"{plan.units[2].unit_id}.*not readable as Parquet"):
        audit(plan)


def test_a_missing_part_is_named(ray_local: None, plan: Plan) -> None:
    audit(plan)
    os.unlink(plan.part_url(plan.units[4]))
    with pytest.raises(AccountingError, match=f"{plan.units[4].unit_id}.*missing"):
        audit(plan)


def test_a_shard_whose_units_do_not_hold_its_rows_is_named(ray_local: None, plan: Plan) -> None:
    shard = plan.units[-1].shard_url
    longer = replace(plan, rows_by_shard={**plan.rows_by_shard, shard: 11})
    with pytest.raises(AccountingError, match=f"{shard} hold 10 rows, expected 11"):
        audit(longer)


def test_parts_that_nobody_touched_are_not_read_again(
    ray_local: None, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = audit(plan)
    # Of the same version to the eye, with other bytes: whoever reads it finds out.
    touched = Path(plan.part_url(plan.units[0]))
    stat = touched.stat()
    touched.write_bytes(b"\0" * stat.st_size)
    os.utime(touched, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = audit(plan)
    assert again == first
    os.utime(touched)
    with pytest.raises(AccountingError, match=plan.units[0].unit_id):
        audit(plan)


def test_a_part_that_was_replaced_is_read_again(ray_local: None, plan: Plan) -> None:
    first = audit(plan)
    unit = plan.units[5]
    write_part(plan, unit, list(range(unit.start, unit.stop)), last="error")
    again = audit(plan)
    assert again.with_errors() == {unit.unit_id}
    assert again.rows_by_status["error"] == 1
    assert again.digest != first.digest
    again.refuse_changed(plan)
    with pytest.raises(StorageError, match=f"1 part changed .* {unit.unit_id}.parquet"):
        first.refuse_changed(plan)


def test_the_ledger_is_only_a_memory(ray_local: None, plan: Plan, tmp_path: Path) -> None:
    first = audit(plan)
    ledger = tmp_path / "out/ledger/fp.parquet"
    assert ledger.is_file()
    whole = ledger.read_bytes()
    for at in range(4, len(whole), max(1, len(whole) // 40)):  # a flipped bit, wherever it is
        ledger.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert accounting._read_ledger(plan) in ({}, first.entries)
    ledger.write_bytes(b"not Parquet")
    assert audit(plan) == first
    assert pq.read_table(ledger).num_rows == len(plan.units)
    ledger.unlink()
    assert audit(plan) == first


def test_the_ledger_keeps_older_parts_and_forgets_deleted_ones(
    ray_local: None, plan: Plan, tmp_path: Path
) -> None:
    audit(plan)
    gone, other = plan.units[0], plan.units[1]
    os.unlink(plan.part_url(gone))
    rest = plan.without({gone.unit_id, other.unit_id})  # `other` is of an older input
    touched = rest.units[0]
    write_part(plan, touched, list(range(touched.start, touched.stop)))
    audit(rest)
    known = pq.read_table(tmp_path / "out/ledger/fp.parquet")["unit_id"].to_pylist()
    assert set(known) == {unit.unit_id for unit in plan.units} - {gone.unit_id}
    assert set(accounting._read_ledger(plan)) == set(known)
