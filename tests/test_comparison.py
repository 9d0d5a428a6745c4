"""Arms, held-out sets and verdicts, by hand."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from pipeline import comparison_report
from pipeline.comparison import (
    Comparison,
    _contents,
    _distinct,
    _draw,
    _held_out_sets,
    _tokens,
    _without,
)
from pipeline.config_training import CompareConfig
from pipeline.curves import draw_curves
from pipeline.schemas import EXAMPLES


def examples(*lengths: int, first_id: int = 0) -> pa.Table:
    rows = [
        {
            "sample_id": (first_id + i).to_bytes(16, "big"),
            "input_ids": list(range(length)),
            "is_target": [False] + [True] * (length - 1),
        }
        for i, length in enumerate(lengths)
    ]
    return pa.Table.from_pylist(rows, EXAMPLES)


def ids(table: pa.Table) -> list[int]:
    return [int.from_bytes(i, "big") for i in table["sample_id"].to_pylist()]


def test_arms_have_the_rows_or_the_tokens_of_the_subset() -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 400).tolist()
    whole = examples(*lengths)
    cherry = whole.take(pa.array(np.argsort(lengths)[-40:]))  # the longest
    assert _draw("cherry", 1, cherry, whole) == cherry
    rows = [_draw("random_rows", seed, cherry, whole) for seed in (1, 1, 2)]
    assert [len(t) for t in rows] == [40, 40, 40]
    assert ids(rows[0]) == ids(rows[1]) != ids(rows[2])
    tokens = _draw("random_tokens", 1, cherry, whole)
    assert abs(_tokens(tokens).sum() - _tokens(cherry).sum()) <= 30
    assert len(tokens) > 60
    assert set(ids(rows[0])) < set(ids(tokens))  # the same order, further down


def test_what_is_held_out_is_nowhere_else() -> None:
    """By its tokens: another id may be of what nobody answered, or of another layout."""
    table = pa.concat_tables([examples(3, 4, 5), examples(3, 4, first_id=7)])
    assert ids(_distinct(table)) == [0, 1, 2]
    assert ids(_without(table, _contents(examples(4, first_id=99)))) == [0, 2, 7]
    other = examples(4).set_column(2, "is_target", pa.array([[False] * 4], EXAMPLES.types[2]))
    assert ids(_without(table, _contents(other))) == ids(table)  # another loss is asked for


def test_held_out_rows_are_not_those_that_ties_prefer() -> None:
    """Among rows with one score, selecting takes the smallest ids."""
    table = examples(3, 4, 5, 6)
    names = [bytes([n]) + bytes(14) + bytes([9 - n]) for n in range(4)]
    table = table.set_column(0, "sample_id", pa.array(names, pa.binary(16)))
    held = _held_out_sets(None, CompareConfig(holdout_rows=2), {}, table)["input"]
    assert sorted(held["sample_id"].to_pylist()) == names[2:]


def test_offsets_of_examples_have_room_for_over_two_billion_tokens() -> None:
    assert all(pa.types.is_large_list(EXAMPLES.field(n).type) for n in ("input_ids", "is_target"))


def report(cherry: list[float], random: list[float], name: str = "input") -> dict[str, Any]:
    seeds = list(range(len(cherry)))
    return {
        "seeds": seeds,
        "before": {name: {"loss": 2.0, "exact_match": 0.0}},
        "arms": [
            {
                "arm": arm,
                "rows": [10] * len(seeds),
                "tokens": [100] * len(seeds),
                "steps": [4] * len(seeds),
                "loss": {name: losses},
                "exact_match": {name: [0.5] * len(seeds)},
                "curves": {name: [[(0, 2.0), (4, loss)] for loss in losses]},
            }
            for arm, losses in (("cherry", cherry), ("random_rows", random))
        ],
    }


def said(found: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        comparison_report.show(Comparison("out/comparison/fp", found), console)
    return capture.get()


@pytest.mark.parametrize(
    ("cherry", "random", "verdict"),
    [
        ([1.0, 1.01, 0.99], [1.2, 1.21, 1.19], "better by 0.2000\n"),
        ([1.2, 1.21, 1.19], [1.0, 1.01, 0.99], "worse by 0.2000\n"),
        ([1.0, 1.1, 0.9], [1.01, 1.11, 0.91], "better by 0.0100, which chance explains (0.2267)\n"),
        ([1.0], [1.2], "better by 0.2000, of one seed\n"),
        ([1.0], [1.0], "no different\n"),
        ([1.0, 1.1], [1.1, 1.0], "no different\n"),
    ],
)
def test_a_result_is_said_as_it_is(cherry: list[float], random: list[float], verdict: str) -> None:
    text = said(report(cherry, random))
    assert f"cherry against random rows: {verdict}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_curves_are_the_same_bytes_each_time_whatever_the_names() -> None:
    found = report([1.0, 1.1], [1.2, 1.3], name="a $ b_$ [/b] \x1b[31m")
    for form in ("svg", "png"):
        assert draw_curves(found, form) == draw_curves(found, form)
    assert "[/b]" in said(found)
    assert "\x1b" not in said(found)


def test_seeds_with_other_steps_are_drawn_together() -> None:
    found = report([1.0, 1.1], [1.2, 1.3])
    found["arms"][1]["curves"]["input"] = [[(0, 2.0), (4, 1.2)], [(0, 2.0), (3, 1.5), (6, 1.3)]]
    assert draw_curves(found, "svg")
