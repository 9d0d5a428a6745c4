"""The tables that stages hand to each other and to storage, in one place."""

import pyarrow as pa

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
