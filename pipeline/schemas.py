"""The tables that stages hand to each other and to storage, in one place."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import CherryError

STATUSES = (
    "ok",
    "empty_response",
    "too_short",
    "prompt_overlong",
    "nonfinite",
    "malformed",
    "error",
)
"""Every row has one. Their counts add up to the input's rows."""

FAILED_STATUSES = ("nonfinite", "malformed", "error")
"""The ones that `score.max_error_fraction` counts: the row or the run is broken. The others say
what a sound corpus contains: empty, tiny and overlong answers."""

TOKENS = pa.schema(
    [
        ("row_index", pa.int64()),
        ("sample_id", pa.binary(16)),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("num_prompt_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        # Per assistant turn: direct_start, conditioned_start, direct_scored_start, end.
        ("turns", pa.list_(pa.list_(pa.int32(), 4))),
    ]
)
"""Tokenise -> score: one row per input row."""

PART = pa.schema(
    [
        ("row_index", pa.int64()),  # in the shard
        ("sample_id", pa.binary(16)),  # null for a malformed row
        ("status", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),  # scored in the conditioned pass
        ("num_direct_tokens", pa.int32()),  # scored in the direct pass
        ("truncated", pa.bool_()),
        ("nll_conditioned", pa.float64()),  # sums in nats
        ("nll_direct", pa.float64()),
        ("ifd_loss_ratio", pa.float64()),
        ("ifd_ppl_ratio", pa.float64()),
        (
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("num_response_tokens", pa.int32()),
                        ("num_direct_tokens", pa.int32()),
                        ("nll_conditioned", pa.float64()),
                        ("nll_direct", pa.float64()),
                    ]
                )
            ),
        ),
    ]
)
"""A part: one row per input row of the unit, in input order. Scores are null unless ok."""

KNOWN = pa.schema(
    [f for f in PART if f.name not in ("row_index", "status", "reason")],
)
"""What `reuse: rows` keeps in memory of a scored row: 88 bytes where it has one turn."""

LEDGER = pa.schema(
    [
        ("unit_id", pa.string()),
        ("version", pa.string()),  # of the object: its ETag, or modification time
        ("sha256", pa.string()),  # of its bytes
        *((status, pa.int64()) for status in STATUSES),
    ]
)
"""What is known of a part that was read and checked: rows by status, and which bytes they were."""

EMBEDDING = pa.schema(
    [
        ("row_index", pa.int64()),  # in the shard
        ("sample_id", pa.binary(16)),
        ("status", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("nll_prompt", pa.float64()),  # sum in nats over all prompt tokens but the first
        ("embedding", pa.list_(pa.float32())),  # mean of the last hidden states of the prompt
    ]
)
"""A part of brief experience: one row per input row; both last columns null unless `ok`."""

EXAMPLES = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("input_ids", pa.large_list(pa.int32())),
        ("is_target", pa.large_list(pa.bool_())),  # whether the token has a loss
    ]
)
"""What a training reads: one row per row that has an answer."""

BAD_LINE = "_cherry_bad_line"
"""Column of ingested JSON shards: why a line is no row, null for good lines."""

SELECTED = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("ifd_loss_ratio", pa.float64()),
        ("ifd_ppl_ratio", pa.float64()),
        ("rank", pa.int64()),  # 0 is best
    ]
)
"""Columns that a cherry subset has after the input's own."""

EXPERIENCE = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("cluster", pa.int32()),
        ("prompt_ppl", pa.float64()),
    ]
)
"""Columns that an experience subset has after the input's own."""

SMALLEST_FRACTION = pa.field("smallest_fraction", pa.float64())
"""With quotas and several fractions: the smallest of them whose subset the row belongs to."""


def ids_of(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """sample_id as a numpy array, without a Python object per row."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.binary(16))
    start = array.offset * 16
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)[start : start + len(array) * 16]
    return data.view("S16") if len(data) else np.empty(0, "S16")


def flat_lists(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Offsets and values of a list column, without a Python object per value.

    On small models these would cost as much as scoring does. Row `i` is
    `values[offsets[i] : offsets[i + 1]]`.
    """
    lists = column.combine_chunks()
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC stream bytes, as it travels between stages."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_ipc(buffer: pa.Buffer) -> pa.Table:
    """The inverse of `to_ipc`."""
    return pa.ipc.open_stream(buffer).read_all()


def hand_on(
    unit: str,
    tokens: pa.Table | None = None,
    part: pa.Table | None = None,
    *,
    num_tokens: int = 0,
    rows_reused: int = 0,
    started: float = 0.0,
    warnings: Sequence[str] = (),
    failure: CherryError | None = None,
) -> pa.Table:
    """One unit as one row, as it goes from stage to stage."""
    return pa.table(
        {
            "unit": pa.array([unit], pa.string()),
            "tokens": pa.array([None if tokens is None else to_ipc(tokens)], pa.large_binary()),
            "part": pa.array([None if part is None else to_ipc(part)], pa.large_binary()),
            "num_tokens": pa.array([num_tokens], pa.int64()),
            "rows_reused": pa.array([rows_reused], pa.int64()),
            "started": pa.array([started], pa.float64()),
            "warnings": pa.array([list(warnings)], pa.list_(pa.string())),
            "failure": pa.array([failure and str(failure)], pa.string()),
            "failure_kind": pa.array([failure and type(failure).__name__], pa.string()),
        }
    )
