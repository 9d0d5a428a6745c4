"""The cherry subset: columns and types, formats, and what is read to write it."""

import itertools
import json
import os
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored_corpus import MALFORMED, plan_of, read, row, scored, select, select_into, wanted

from pipeline import subset
from pipeline.columns import output_schema
from pipeline.config import InputConfig
from pipeline.errors import ConfigError, InputError
from pipeline.examples import to_lines
from pipeline.inputs import Corpus, open_corpus
from pipeline.layouts import Columns
from pipeline.schemas import BAD_LINE, SELECTED
from pipeline.units import Plan

ray = pytest.mark.ray


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
            ("tags", pa.list_(pa.dictionary(pa.int16(), pa.string()))),
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
            "tags": [f"tag {n}", "all"],
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
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(fraction="0.75"))
    table = read(found)
    # Codes get room for the values of other shards; all else stays as it was.
    roomy = {
        "instruction": pa.dictionary(pa.int32(), pa.string()),
        "tags": pa.list_(pa.dictionary(pa.int32(), pa.string())),
    }
    kept = [field.with_type(roomy.get(field.name, field.type)) for field in schema]
    assert table.schema.remove_metadata() == pa.schema([*kept, *SELECTED])
    best = sorted(range(12), key=lambda n: -ratios[n])[:9]
    assert table.select(schema.names).to_pylist() == [values[n] for n in best]


def write_and_open(folder: Path, *tables: pa.Table) -> Corpus:
    folder.mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"shard-{number}.parquet")
    return open_corpus(InputConfig(path=str(folder)), str(folder.parent / "out"))


TEXTS = {"instruction": ["a", "b"], "output": ["c", "d"]}


@pytest.mark.parametrize("name", SELECTED.names)
def test_reserved_column_is_refused(tmp_path: Path, name: str) -> None:
    plain = pa.table(TEXTS)
    corpus = write_and_open(tmp_path / "corpus", plain, plain.append_column(name, pa.array([1, 2])))
    with pytest.raises(InputError) as caught:
        output_schema(corpus, wanted())
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
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(fraction="1"))
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
        (pa.array(["x", "y"]), pa.array([b"x", b"y"])),
        (pa.array([1, 2]), pa.array([Decimal("1.5")] * 2, pa.decimal128(20, 2))),
        (pa.array([0.5, 1.5]), pa.array([Decimal("1.5")] * 2, pa.decimal128(20, 2))),
        (pa.array([[0.5]] * 2), pa.array([[Decimal("1.5")]] * 2, pa.list_(pa.decimal128(20, 2)))),
    ],
    ids=[
        "int text",
        "int bool",
        "list struct",
        "in a struct",
        "time zone",
        "text bytes",
        "int64 short decimal",
        "double decimal",
        "in a list",
    ],
)
def test_types_that_do_not_go_together_name_both_shards(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    tables = [pa.table(TEXTS), *(pa.table({**TEXTS, "odd": column}) for column in (one, other))]
    corpus = write_and_open(tmp_path / "corpus", *tables)
    with pytest.raises(InputError) as caught:
        output_schema(corpus, wanted())
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
        select(plan, corpus, str(tmp_path / "out"), wanted(fraction="1"))
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
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(fraction="1"))
    table = read(found)
    assert table.schema.names == ["instruction", "output", *SELECTED.names]
    assert table["instruction"].to_pylist() == ["0:2", "0:0", "0:1"]


def test_smallest_fraction_is_reserved_only_where_it_is_written(tmp_path: Path) -> None:
    corpus = write_and_open(
        tmp_path / "corpus", pa.table({**TEXTS, "smallest_fraction": [1, 2], "source": ["a", "b"]})
    )
    assert output_schema(corpus, wanted()).names[2] == "smallest_fraction"
    several = wanted(group_by="source", fractions=["0.1", "0.2"])
    with pytest.raises(InputError, match="'smallest_fraction'"):
        output_schema(corpus, several)


def select_all(folder: Path, *tables: pa.Table, **config: Any) -> Any:
    """Select every row of a corpus, the first one first."""
    write_and_open(folder / "corpus", *tables)
    ids = itertools.count(1)
    rows = [[row(0.9 - n / 10_000, n) for n in itertools.islice(ids, len(t))] for t in tables]
    plan, corpus = plan_of(str(folder / "corpus"), folder / "out", rows)
    return select(plan, corpus, str(folder / "out"), wanted(fraction="1", **config))[0]


@ray
def test_a_column_may_have_any_name(ray_local: None, tmp_path: Path) -> None:
    """`line` is what rows of JSON are called on their way; dots say nothing about nesting."""
    odd = {"line": ["1", "2"], "a": [{"b": 1}, {"b": 2}], "a.b": [3, 4], "rank.of": [5, 6]}
    table = pa.table(TEXTS | odd)
    assert read(select_all(tmp_path, table)).drop(SELECTED.names).to_pylist() == table.to_pylist()


@ray
def test_categories_of_some_shards_are_text_beside_text(ray_local: None, tmp_path: Path) -> None:
    """As pandas writes a Categorical, in one of many exports."""
    both = [pa.array(["p", None]).dictionary_encode(), pa.array(["x", "y"], pa.large_string())]
    for order in (both, both[::-1]):
        folder = tmp_path / str(order[0].type)[:5]
        found = select_all(folder, *(pa.table({**TEXTS, "kind": column}) for column in order))
        kinds = read(found)["kind"].to_pylist()
        assert kinds == [value for column in order for value in column.to_pylist()]


@ray
def test_each_shard_has_categories_of_its_own(ray_local: None, tmp_path: Path) -> None:
    tables = []
    for shard in range(3):
        names = pa.array([f"{shard}:{n}" for n in range(100)])
        kinds = pa.array([f"kind {shard} {n}" for n in range(100)])
        kinds = kinds.cast(pa.dictionary(pa.int8(), pa.string()))
        tables.append(pa.table({"instruction": names, "output": names, "kind": kinds}))
    found = read(select_all(tmp_path, *tables))
    assert found["kind"].to_pylist() == [f"kind {s} {n}" for s in range(3) for n in range(100)]


@ray
def test_views_are_written_as_what_they_are_views_of(ray_local: None, tmp_path: Path) -> None:
    texts = {name: pa.array(values, pa.string_view()) for name, values in TEXTS.items()}
    found = read(select_all(tmp_path, pa.table(texts)))
    assert found.schema.field("output").type == pa.large_string()
    assert found.select(["instruction", "output"]).to_pydict() == TEXTS


@ray
def test_required_fields_are_written(ray_local: None, tmp_path: Path) -> None:
    """As Spark and Avro write them."""
    kind = pa.struct([pa.field("source", pa.string(), nullable=False)])
    table = pa.table({**TEXTS, "meta": pa.array([{"source": "web"}, None], kind)})
    found = read(select_all(tmp_path, table))
    assert found["meta"].to_pylist() == [{"source": "web"}, None]


def test_a_type_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tags = pa.array([["x", "y"], None], pa.list_view(pa.string()))
    corpus = write_and_open(tmp_path / "corpus", pa.table({**TEXTS, "tags": tags}))
    with pytest.raises(InputError, match=r"column 'tags' of shard .* has type list_view"):
        output_schema(corpus, wanted())


@pytest.mark.parametrize(
    ("form", "name"),
    [("alpaca_jsonl", "output"), ("alpaca_jsonl", "history"), ("messages_jsonl", "input")],
)
def test_a_column_under_a_name_of_the_format_is_refused(
    tmp_path: Path, form: Any, name: str
) -> None:
    """It would stand where a trainer looks for the answer."""
    corpus = write_and_open(
        tmp_path / "corpus", pa.table({"messages": CHAT[:1], name: ["not the answer"]})
    )
    named = [[{**message, "name": "x"} for message in CHAT[1]]]
    both = write_and_open(tmp_path / "named", pa.table({"messages": named, "name": ["y"]}))
    assert "name" in output_schema(both, wanted(format="messages_jsonl")).names
    if form == "messages_jsonl":  # which has no such key
        assert name in output_schema(corpus, wanted(format=form)).names
        return
    with pytest.raises(InputError, match=f"column '{name}' is no part of layout messages"):
        output_schema(corpus, wanted(format=form))


def test_a_year_that_json_cannot_say_is_named() -> None:
    far = pa.table({"day": pa.array([10**7], pa.date32())})
    lines = to_lines(far, far, Columns("alpaca", {}), "jsonl", None, ["shard a, row 0"])
    with pytest.raises(InputError, match=r"shard a, row 0 .*years up to 9999"):
        list(lines)


def test_objects_and_text_over_pieces_of_json_do_not_go_together(tmp_path: Path) -> None:
    for name, one, other in (("a", {"x": 1}, "text"), ("b", "text", {"x": 1}), ("c", [1], "text")):
        folder = tmp_path / name / "in"
        folder.mkdir(parents=True)
        for number, value in enumerate((one, other)):
            line = json.dumps({"prompt": "a", "completion": "b", "meta": value})
            (folder / f"{number}.jsonl").write_text(line)
        corpus = open_corpus(InputConfig(path=str(folder)), str(tmp_path / name / "out"))
        with pytest.raises(InputError, match="column 'meta'"):
            output_schema(corpus, wanted())


def test_shards_without_rows_say_nothing_of_columns(tmp_path: Path) -> None:
    full, empty = pa.table({**TEXTS, "odd": [1, 2]}), pa.table({**TEXTS, "odd": ["x", "y"]})
    corpus = write_and_open(tmp_path / "corpus", full, empty.slice(0, 0))
    assert output_schema(corpus, wanted()).field("odd").type == pa.int64()


@ray
def test_a_shard_of_short_rows_makes_no_longer_parts_of_long_ones(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subset, "_MOST_BYTES_PER_PART", 5_000)
    short = pa.table({"instruction": ["0:0"] * 3000, "output": ["x"] * 3000})
    long = pa.table({"instruction": ["1:0"] * 9, "output": [f"{n:01000}" for n in range(9)]})
    write_and_open(tmp_path / "corpus", short, long)
    rows = [[row(0.1, n) for n in range(3000)], [row(0.9, n) for n in range(3000, 3009)]]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows, unit_rows=3000)
    found, _ = select(plan, corpus, str(tmp_path / "out"), wanted(count=12))
    assert max(part["rows"] for part in found.manifest["parts"]) <= 5
    # Of one long row, the others are no longer for it.
    sizes = {plan.units[0].shard_url: 100.0, plan.units[1].shard_url: 4_000.0}
    assert subset._rows_per_part(plan, np.array([3000, 1]), sizes, wanted()) == 11


@ray
def test_parts_are_shorter_where_rows_are_long(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subset, "_MOST_BYTES_PER_PART", 5_000)
    monkeypatch.setattr(subset, "_MOST_TASKS", 2)  # a writer has several parts
    names = [f"0:{n}" for n in range(30)]
    long = [f"{n:01000}" for n in range(30)]
    found = select_all(tmp_path, pa.table({"instruction": names, "output": long}))
    sizes = [part["rows"] for part in found.manifest["parts"]]
    assert set(sizes[:-1]) <= {2, 3, 4}
    assert sum(sizes) == 30
    assert read(found)["instruction"].to_pylist() == names


@pytest.mark.parametrize("counts", [[1] * 150, [0] * 70 + [3, 0] * 100 + [0] * 9, [5]], ids=len)
def test_few_rows_of_many_units_are_taken_by_several_tasks(counts: list[int]) -> None:
    units: Any = tuple(SimpleNamespace(shard_url="shard") for _ in counts)
    rows = np.array(counts)
    dealt = subset._deal_units(Plan(units, "scores", {}), rows, {"shard": 10.0})
    assert [index for some in dealt for index in range(some.start, some.stop)] == [
        *range(len(rows))
    ]
    most = [int((rows[some] > 0).sum()) for some in dealt]
    assert max(most) <= 64
    assert len(dealt) == -(-int((rows > 0).sum()) // 64)


# Groups


def test_a_column_of_groups_that_no_shard_has_is_named(tmp_path: Path) -> None:
    corpus = write_and_open(tmp_path / "corpus", pa.table({**TEXTS, "language": ["en", "de"]}))
    with pytest.raises(ConfigError, match="Did you mean 'language'"):
        output_schema(corpus, wanted(group_by="languag"))
    with pytest.raises(ConfigError, match="they have: instruction, output, language"):
        output_schema(corpus, wanted(group_by="zzz"))


@pytest.mark.parametrize(
    "column", [pa.array([1.5, 2.5]), pa.array([[1], [2]]), pa.array([b"a", b"b"])], ids=str
)
def test_values_that_name_no_group_are_refused(tmp_path: Path, column: pa.Array) -> None:
    corpus = write_and_open(tmp_path / "corpus", pa.table({**TEXTS, "odd": column}))
    with pytest.raises(ConfigError, match="column 'odd' has type"):
        output_schema(corpus, wanted(group_by="odd"))


@ray
@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pa.array([7, None, 7]), ["7", None]),
        (pa.array([True, False, None]), ["false", "true", None]),
        (pa.array(["x", None, "y"]).dictionary_encode(), ["x", "y", None]),
        (pa.array(["x", "[/b]", ""], pa.large_string()), ["", "[/b]", "x"]),
    ],
    ids=["int", "bool", "dictionary", "text"],
)
def test_groups_are_the_values_as_text(
    ray_local: None, tmp_path: Path, column: pa.Array, names: list[str | None]
) -> None:
    texts = ["0:0", "0:1", "0:2"]
    write_and_open(
        tmp_path / "corpus", pa.table({"instruction": texts, "output": texts, "kind": column})
    )
    rows = [[row(0.4, 1), row(0.3, 2), row(0.2, 3)]]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows)
    found, _ = select_into(tmp_path, plan, corpus, group_by="kind", count=1)
    assert [group["group"] for group in found.manifest["groups"]] == names
    assert found.manifest["selected_rows"] == len(names)


@ray
def test_a_quota_of_a_group_that_is_not_there_is_refused(ray_local: None, tmp_path: Path) -> None:
    plan, corpus = scored(tmp_path, [[row(0.4, 1, group="web"), row(0.3, 2, group="code")]])
    with pytest.raises(ConfigError, match=r"no group 'wbe' .it has 2: 'code', 'web'.*mean 'web'"):
        select_into(tmp_path, plan, corpus, group_by="source", quotas={"wbe": 1})


# Formats


CHAT = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye"},
        {"role": "user", "content": "Still there?"},
    ],
    [{"role": "user", "content": "One\nline\u2028"}, {"role": "assistant", "content": "é"}],
]


def lines_of(found: Any) -> list[dict[str, Any]]:
    """Every line of the output's parts, in order."""
    lines = []
    for part in found.manifest["parts"]:
        text = Path(found.url, part["path"]).read_text(encoding="utf-8")
        assert text.endswith("\n")
        assert text.count("\n") == part["rows"]
        lines += [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    return lines


def select_as(folder: Path, table: pa.Table, form: str) -> list[dict[str, Any]]:
    """The lines of a corpus of one shard, all of it selected, the first row first."""
    write_and_open(folder / "corpus", table)
    rows = [row(0.9 - n / 100, n + 1) for n in range(len(table))]
    plan, corpus = plan_of(str(folder / "corpus"), folder / "out", [rows])
    found, _ = select(
        plan, corpus, str(folder / "out"), wanted(fraction="1", format=form, rows_per_part=2)
    )
    lines = lines_of(found)
    assert [line.pop("rank") for line in lines] == list(range(len(table)))
    assert [line.pop("sample_id") for line in lines] == [f"{n + 1:032x}" for n in range(len(table))]
    assert [line.pop("ifd_loss_ratio") for line in lines] == [r.ratio for r in rows]
    assert [line.pop("ifd_ppl_ratio") for line in lines] == [-(r.ratio or 0) for r in rows]
    return lines


ALPACA = {"instruction": ["a", "b", "c"], "input": ["x", "", None], "output": ["1", "2", "3"]}


@ray
def test_alpaca_rows_as_trainers_read_them(ray_local: None, tmp_path: Path) -> None:
    table = pa.table({"other": [1, 2, 3], **ALPACA})
    assert select_as(tmp_path / "alpaca", table, "alpaca_jsonl") == [
        {"instruction": "a", "input": "x", "output": "1", "other": 1},
        {"instruction": "b", "input": "", "output": "2", "other": 2},
        {"instruction": "c", "input": "", "output": "3", "other": 3},
    ]
    assert select_as(tmp_path / "messages", table, "messages_jsonl") == [
        {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
            "other": n,
        }
        for q, a, n in (("a\nx", "1", 1), ("b", "2", 2), ("c", "3", 3))
    ]
    assert select_as(tmp_path / "own", table, "jsonl") == table.to_pylist()


@ray
def test_chats_as_trainers_read_them(ray_local: None, tmp_path: Path) -> None:
    table = pa.table({"messages": CHAT, "tools": ["[]", None]})
    assert select_as(tmp_path / "messages", table, "messages_jsonl") == [
        {"messages": CHAT[0][:5], "tools": "[]"},  # what nobody answered is no part of the score
        {"messages": CHAT[1], "tools": None},
    ]
    assert select_as(tmp_path / "alpaca", table, "alpaca_jsonl") == [
        {
            "instruction": "And?", "input": "", "output": "Bye", "system": "Be brief.",
            "history": [["Hi", "Hello"]], "tools": "[]",
        },
        {
            "instruction": "One\nline\u2028", "input": "", "output": "é", "system": "",
            "history": [], "tools": None,
        },
    ]  # fmt: skip
    [part] = (tmp_path / "messages/out").rglob("*.jsonl")
    assert len(part.read_text().splitlines()) == 2  # U+2028 does not end one


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
MIXED = {
    "alpaca": pa.table({"instruction": ["q"], "input": ["x"], "output": ["a"], "source": ["web"]}),
    "dolly": pa.table({"instruction": ["q"], "context": ["x"], "response": ["a"]}),
    "prompts": pa.table({"prompt": ["q\nx"], "completion": ["a"]}),
    "chats": pa.table({"messages": [[{"role": "user", "content": "q\nx"}, SAID[1]]]}),
    "sharegpt": pa.table(
        {"conversations": [[{"from": "human", "value": "q\nx"}, {"from": "gpt", "value": "a"}]]}
    ),
}


@ray
@pytest.mark.parametrize("form", ["alpaca_jsonl", "messages_jsonl"])
def test_layouts_that_differ_become_the_same_examples(
    ray_local: None, tmp_path: Path, form: str
) -> None:
    """A column of one layout is none of another's, and must not come over an example as null."""
    write_and_open(tmp_path / "corpus", *MIXED.values())
    rows = [[row(0.9 - n / 100, n + 1)] for n in range(len(MIXED))]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows)
    found, _ = select_into_lines(tmp_path, plan, corpus, form)
    assert [line["source"] for line in found] == ["web", None, None, None, None]
    keys = {"source", "sample_id", "rank", "ifd_loss_ratio", "ifd_ppl_ratio"}
    if form == "alpaca_jsonl":
        keys |= {"instruction", "input", "output", "system", "history"}
        asked = ["\n".join(filter(None, (x["instruction"], x["input"]))) for x in found]
        assert asked == ["q\nx"] * len(MIXED)
        assert [x["output"] for x in found] == ["a"] * len(MIXED)
        assert [(x["system"], x["history"]) for x in found] == [("", [])] * len(MIXED)
    else:
        keys |= {"messages"}
        expected = [{"role": "user", "content": "q\nx"}, SAID[1]]
        assert [x["messages"] for x in found] == [expected] * len(MIXED)
    assert [set(line) for line in found] == [keys] * len(MIXED)


@ray
def test_a_column_that_is_the_layouts_in_one_shard_is_kept_where_it_is_not(
    ray_local: None, tmp_path: Path
) -> None:
    plain = pa.table({"instruction": ["q"], "output": ["a"], "prompt": ["why"]})
    write_and_open(tmp_path / "corpus", plain.drop_columns("prompt"), MIXED["prompts"], plain)
    corpus = open_corpus(
        InputConfig(path=str(tmp_path / "corpus"), layout="auto"), str(tmp_path / "out")
    )
    assert [shard.columns.layout for shard in corpus.shards] == [
        "alpaca", "prompt_completion", "alpaca",
    ]  # fmt: skip
    rows = [[row(0.9 - n / 100, n + 1)] for n in range(3)]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows)
    found, _ = select_into_lines(tmp_path, plan, corpus, "messages_jsonl")
    assert [line["prompt"] for line in found] == [None, None, "why"]
    assert "completion" not in found[0]


def select_into_lines(
    folder: Path, plan: Plan, corpus: Corpus, form: str
) -> tuple[list[dict[str, Any]], Any]:
    found, _ = select(plan, corpus, str(folder / "out"), wanted(fraction="1", format=form))
    return lines_of(found), found


def test_without_a_readable_shard_there_is_nothing_to_select_from(tmp_path: Path) -> None:
    write_and_open(tmp_path / "corpus", pa.table(TEXTS))
    rows = [[row(0.5, 1), row(0.4, 2)]]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows)
    unread = plan.without({unit.unit_id for unit in plan.units})
    with pytest.raises(InputError, match="none of its 1 shard could be read"):
        select(unread, corpus, str(tmp_path / "out"), wanted())


@ray
def test_columns_of_shards_that_have_no_rows_make_another_selection(
    ray_local: None, tmp_path: Path
) -> None:
    """They may add a key to every line; the selection of before must not be taken for this one."""
    plain = pa.table({"instruction": ["q"], "output": ["a"]})
    write_and_open(tmp_path / "corpus", plain)
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", [[row(0.5, 1)]])
    _, before = select_into_lines(tmp_path, plan, corpus, "alpaca_jsonl")
    empty = pa.table({**plain.to_pydict(), "system": ["s"]}).slice(0, 0)
    pq.write_table(empty, tmp_path / "corpus/shard-1.parquet")
    corpus = open_corpus(InputConfig(path=str(tmp_path / "corpus")), str(tmp_path / "out"))
    lines, after = select_into_lines(tmp_path, plan, corpus, "alpaca_jsonl")
    assert after.url != before.url
    assert lines[0]["system"] == ""


@pytest.mark.slow
def test_rows_of_one_part_that_are_too_long_together_are_named(tmp_path: Path) -> None:
    """2 GiB of one text: where the rows of one shard differ much, its mean says little."""
    half = pa.array([b"x" * 2**30]).cast(pa.string())
    huge = pa.table({"rank": [0, 1], "line": pa.chunked_array([half, half])})
    with pytest.raises(InputError, match=r"Set select.rows_per_part well under 50000"):
        subset._write_parts._function([str(tmp_path / "part.jsonl")], 50_000, "jsonl", huge)


@ray
def test_maps_are_objects_in_json(ray_local: None, tmp_path: Path) -> None:
    kinds = pa.array([[("a", 1), ("b", 2)], [], None], pa.map_(pa.string(), pa.int64()))
    raw = pa.array([[(b"\1\2", True)], [(b"", None)], []], pa.map_(pa.binary(), pa.bool_()))
    flags = pa.array([[(True, 1.5)], [], []], pa.map_(pa.bool_(), pa.float64()))
    table = pa.table({**ALPACA, "kinds": kinds, "raw": raw, "flags": flags})
    lines = select_as(tmp_path, table, "jsonl")
    assert [line["kinds"] for line in lines] == [{"a": 1, "b": 2}, {}, None]
    assert [line["raw"] for line in lines] == [{"0102": True}, {"": None}, {}]
    assert [line["flags"] for line in lines] == [{"true": 1.5}, {}, {}]


@ray
def test_every_message_has_the_same_keys(ray_local: None, tmp_path: Path) -> None:
    call = [{"name": "f", "arguments": "{}"}]
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": call},
            {"role": "tool", "content": "1", "name": "f"},
            {"role": "assistant", "content": "b"},
        ],
    ]
    lines = select_as(tmp_path, pa.table({"messages": chats}), "messages_jsonl")
    keys = {tuple(message) for line in lines for message in line["messages"]}
    assert keys == {("role", "content", "name", "tool_calls")}
    assert lines[1]["messages"][1]["tool_calls"] == call


@ray
@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([{"role": "user", "content": "a"}, *CHAT[1]], "after 0 messages come user, user"),
        (
            [CHAT[1][0], {**CHAT[1][1], "tool_calls": [{"name": "f"}]}],
            "a sample that calls tools",
        ),
    ],
    ids=["two users", "tools"],
)
def test_what_has_no_form_as_alpaca_is_refused(
    ray_local: None, tmp_path: Path, chat: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        select_as(tmp_path, pa.table({"messages": [CHAT[1], chat]}), "alpaca_jsonl")
    said = str(caught.value.cause)
    assert said.startswith(f"shard {tmp_path}/corpus/shard-0.parquet, row 1: {says}")
    assert "Set select.format: messages_jsonl and run cherry select" in said
    assert not (tmp_path / "out" / "LATEST.json").exists()


@ray
def test_text_that_is_not_utf8_is_named(ray_local: None, tmp_path: Path) -> None:
    column = pa.array([b"ok", b"\xff"]).view(pa.string())
    table = pa.table({**TEXTS, "odd": column})
    with pytest.raises(InputError) as caught:
        select_all(tmp_path / "group", table, group_by="odd")
    assert "shard-0.parquet: column 'odd'" in str(caught.value.cause)
    with pytest.raises(InputError) as caught:
        select_all(tmp_path / "line", table, format="jsonl")
    assert "shard-0.parquet, row 0 or a row after it" in str(caught.value.cause)


# What is read


@ray
def test_row_groups_without_a_selected_row_are_not_read(ray_local: None, tmp_path: Path) -> None:
    names = [f"0:{n}" for n in range(40)]
    table = pa.table({"instruction": names, "output": names})
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "shard-0.parquet"
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False)
    ratios = [0.9 if 16 <= n < 20 else 0.5 - n / 100 for n in range(40)]
    rows = [[row(ratio, n) for n, ratio in enumerate(ratios)]]
    plan, corpus = plan_of(str(tmp_path / "corpus"), tmp_path / "out", rows, unit_rows=10)
    groups = pq.ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    for number in range(groups.num_row_groups):
        if number != 4:  # whoever reads another finds that it is broken
            for column in range(2):
                chunk = groups.row_group(number).column(column)
                start = chunk.data_page_offset
                data[start : start + chunk.total_compressed_size] = bytes(
                    chunk.total_compressed_size
                )
    written = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(written, written))  # what was overwritten is refused anyway
    _, chosen = select_into(tmp_path, plan, corpus, count=4)
    assert chosen == names[16:20]
    with pytest.raises(Exception, match=r"Couldn.t deserialize|Corrupt|cannot be read"):
        select_into(tmp_path, plan, corpus, count=5)
