"""Corpora that are scored without a model, and what a selection makes of them.

A test states its corpus as rows of (ratio, sample_id, status, tokens, group); they are written as
shards and as the parts that scoring would have left. Then everything is the real thing.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipeline import selection
from pipeline.accounting import audit
from pipeline.budgets import SelectSettings
from pipeline.config import InputConfig
from pipeline.config_select import SelectConfig
from pipeline.inputs import Corpus, open_corpus
from pipeline.manifests import Finished
from pipeline.schemas import PART
from pipeline.survey import Survey
from pipeline.units import Plan, make_plan


@dataclass(frozen=True)
class Row:
    """One input row and its score."""

    ratio: float | None
    sample_id: bytes | None
    status: str = "ok"
    tokens: int = 5
    group: str | None = None


def row(ratio: float, name: int | bytes, tokens: int = 5, group: str | None = None) -> Row:
    """A scored row; `name` is its sample_id."""
    raw = name if isinstance(name, bytes) else name.to_bytes(16, "big")
    return Row(ratio, raw, "ok", tokens, group)


EMPTY = Row(None, b"e" * 16, "empty_response", 0)
MALFORMED = Row(None, None, "malformed", 0)


# Corpora on disk


def write_shards(
    folder: Path, shards: Sequence[Sequence[Row]], row_group_size: int | None = None
) -> str:
    """Alpaca shards whose instruction is `SHARD:ROW`; `source` is the group."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(shards):
        names = pa.array([f"{number}:{i}" for i in range(len(rows))], pa.string())
        table = pa.table({"instruction": names, "output": names})
        if any(r.group is not None for r in rows):  # elsewhere the column is absent: null
            table = table.append_column("source", pa.array([r.group for r in rows], pa.string()))
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
    plan: Plan, corpus: Corpus, output: str, settings: SelectSettings
) -> tuple[Finished, Survey | None]:
    return selection.select(plan, corpus, output, settings, audit(plan))


def select_into(
    folder: Path, plan: Plan, corpus: Corpus, **config: Any
) -> tuple[Finished, list[str]]:
    """Select, and name the rows that came out, in their order."""
    found, _ = select(plan, corpus, str(folder / "out"), wanted(**config))
    return found, names_of(found)


def names_of(found: Finished) -> list[str]:
    return read(found)["instruction"].to_pylist() if found.manifest["parts"] else []


def read(found: Finished) -> pa.Table:
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


# Strategies

FINITE = st.floats(allow_nan=False, allow_infinity=False)
EDGES = st.sampled_from(
    [
        0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308,
        -1.7976931348623157e308, 1.0, math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0), -1.0,
        0.5, math.nextafter(0.5, 1.0), 0.9, 0.8999999999999999,
    ]
)  # fmt: skip


# Ids that a comparison of C strings, or of signed bytes, would get wrong.
HARD_IDS = st.sampled_from(
    [
        bytes(16), bytes(15) + b"\1", b"\1" + bytes(15), b"\xff" * 16, b"\x80" + bytes(15),
        b"\x7f" + b"\xff" * 15, b"a\0b" + bytes(13), b"a\0c" + bytes(13), b"a" + bytes(15),
    ]
)  # fmt: skip
IDS = HARD_IDS | st.binary(min_size=16, max_size=16)
RATIOS = st.floats(0.0, 1.2) | st.sampled_from([0.25, 0.5, 0.5, 0.75, 1.0]) | EDGES | FINITE
