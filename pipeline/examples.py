"""Selected rows as lines of JSON: with their own columns, or as trainers read them.

Whatever the layout of the input, `alpaca_jsonl` has instruction, input and output (system and
history where a sample has more turns, as LLaMA-Factory names them), and `messages_jsonl` has
messages of role and content. After them come the columns that a Parquet subset has too.
"""

import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.config import Format
from pipeline.errors import InputError
from pipeline.samples import Columns, Message, Sample, read_samples
from pipeline.templates import chat_messages


def to_lines(
    rows: pa.Table, added: pa.Table, columns: Columns, form: Format, where: str
) -> Iterator[str]:
    """One line of JSON per row, without its end.

    Args:
        rows: The input's columns.
        added: What the selection adds to each row.
        columns: Which column of `rows` holds what.
        form: Any but `parquet`.
        where: Of the shard, for messages.

    Raises:
        InputError: A row has no form as Alpaca: it uses tools, or two users speak in a row.
    """
    own: Iterator[dict[str, Any]]
    if form == "jsonl":
        own = iter(rows.to_pylist())
    else:
        write = _as_alpaca if form == "alpaca_jsonl" else _as_messages
        own = (write(sample, where) for sample in read_samples(rows, columns))
    for example, extra in zip(own, added.to_pylist(), strict=True):
        yield json.dumps(_plain(example | extra), ensure_ascii=False, allow_nan=False)


def _as_messages(sample: Sample, where: str) -> dict[str, Any]:
    return {"messages": chat_messages(sample.messages)}


def _as_alpaca(sample: Sample, where: str) -> dict[str, Any]:
    system = [m.content for m in sample.messages if m.role == "system"]
    rest = [m for m in sample.messages if m.role != "system"]
    while rest and rest[-1].role != "assistant":  # what nobody answered
        rest.pop()
    turns = list(_turns(rest, where))
    *history, (instruction, extra, output) = turns
    example: dict[str, Any] = {"instruction": instruction, "input": extra, "output": output}
    if system:
        example["system"] = "\n\n".join(system)
    if history:
        example["history"] = [["\n".join(filter(None, t[:2])), t[2]] for t in history]
    return example


def _turns(messages: list[Message], where: str) -> Iterator[tuple[str, str, str]]:
    """(instruction, input, output) of every turn."""
    roles = [message.role for message in messages]
    at = 0
    while at < len(messages):
        size = 3 if roles[at + 1 : at + 2] == ["input"] else 2
        if roles[at : at + size] not in (["user", "assistant"], ["user", "input", "assistant"]):
            raise InputError(
                f"shard {where}: a sample with the roles {', '.join(roles)} has no form as Alpaca, "
                "which knows turns of user and assistant. Set select.format: messages_jsonl."
            )
        if any(message.extra for message in messages[at : at + size]):
            raise InputError(
                f"shard {where}: a sample that calls tools has no form as Alpaca. Set "
                "select.format: messages_jsonl."
            )
        texts = [message.content for message in messages[at : at + size]]
        yield texts[0], texts[1] if size == 3 else "", texts[-1]
        at += size


def _plain(value: Any) -> Any:
    """A value as JSON can say it: bytes in hex, times in ISO 8601, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, Decimal) else value
