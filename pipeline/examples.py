"""Selected rows as lines of JSON: with their own columns, or as trainers read them.

Whatever the layout of the input, `alpaca_jsonl` has instruction, input and output, and, where the
corpus has chats, system and history (pairs of earlier turns); `messages_jsonl` has messages of role
and content. What nobody answered is left out, as it is when a sample is scored. Columns that are no
part of the layout, such as source or tools, come after that, then what the selection adds. Every
line has the same keys: readers that guess types from the first megabytes rely on it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any

import pyarrow as pa

from pipeline.config_select import Format
from pipeline.errors import InputError
from pipeline.inputs import Corpus
from pipeline.layouts import Columns
from pipeline.samples import Message, Sample, read_samples
from pipeline.templates import chat_messages, until_last_answer

_EXTRA_KEYS = ("name", "tool_call_id", "tool_calls")
_LINE_ENDS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})
"""For readers that split lines as Python does."""


def is_example(form: Format) -> bool:
    """Whether a line is an example made of a row, and not the row itself."""
    return form in ("alpaca_jsonl", "messages_jsonl")


def message_keys(corpus: Corpus) -> tuple[str, ...]:
    """What messages of any shard have besides role and content."""
    found: set[str] = set()
    for shard in corpus.shards:
        for name in ("messages", "conversations"):
            column = shard.columns.names.get(name)
            if column and not pa.types.is_null(kind := shard.schema.field(column).type):
                found |= {field.name for field in kind.value_type}
    return tuple(key for key in _EXTRA_KEYS if key in found)


def example_keys(corpus: Corpus, form: Format) -> tuple[str, ...]:
    """Keys of a line that are the format's own, whatever the input's columns are."""
    if form == "messages_jsonl":
        return ("messages",)
    if form == "alpaca_jsonl":
        chats = any(shard.columns.chats for shard in corpus.shards)
        return ("instruction", "input", "output", *(("system", "history") if chats else ()))
    return ()


def to_lines(
    rows: pa.Table,
    others: pa.Table,
    columns: Columns,
    form: Format,
    keys: tuple[str, ...] | None,
    where: Sequence[str],
) -> Iterator[str]:
    """One line of JSON per row, without its end.

    Args:
        rows: The input's columns as the shard has them.
        others: The columns that come after, in their order.
        columns: Which column of `rows` holds what.
        form: Any but `parquet`.
        keys: From `message_keys`; None if no shard has chats.
        where: Of each row, for messages.

    Raises:
        InputError: A row has no form as Alpaca: it uses tools, or two users speak in a row.
    """
    own: Iterator[dict[str, Any]]
    if form == "jsonl":
        own = ({} for _ in where)
    elif form == "alpaca_jsonl":
        samples = zip(read_samples(rows, columns), where, strict=True)
        own = (_as_alpaca(sample, keys is not None, at) for sample, at in samples)
    else:
        own = (_as_messages(sample, keys or ()) for sample in read_samples(rows, columns))
    try:
        for example, other in zip(own, others.to_pylist(maps_as_pydicts="lossy"), strict=True):
            assert example.keys().isdisjoint(other), (example.keys(), other.keys())
            line = json.dumps(_plain(example | other), ensure_ascii=False, allow_nan=False)
            yield line.translate(_LINE_ENDS)
    except UnicodeDecodeError as err:
        raise InputError(
            f"{where[0]} or a row after it: a text is not UTF-8 ({err}), and JSON has no other. "
            "Convert it, or set select.format: parquet."
        ) from None
    except OverflowError as err:
        raise InputError(
            f"{where[0]} or a row after it: {err}, and JSON takes years up to 9999. Convert it, or "
            "set select.format: parquet."
        ) from None


def _as_messages(sample: Sample, keys: tuple[str, ...]) -> dict[str, Any]:
    absent = dict.fromkeys(keys)
    said = chat_messages(until_last_answer(sample.messages))
    messages = [{"role": m["role"], "content": m["content"], **absent, **m} for m in said]
    return {"messages": messages}


def _as_alpaca(sample: Sample, chats: bool, where: str) -> dict[str, Any]:
    messages = until_last_answer(sample.messages)
    system = [m.content for m in messages if m.role == "system"]
    turns = list(_turns([m for m in messages if m.role != "system"], where))
    *history, (instruction, extra, output) = turns
    example: dict[str, Any] = {"instruction": instruction, "input": extra, "output": output}
    if chats:
        example["system"] = "\n\n".join(system)
        example["history"] = [["\n".join(filter(None, t[:2])), t[2]] for t in history]
    return example


def _turns(messages: list[Message], where: str) -> Iterator[tuple[str, str, str]]:
    """(instruction, input, output) of every turn."""
    at = 0
    while at < len(messages):
        roles = [message.role for message in messages[at : at + 3]]
        size = 3 if roles[1:2] == ["input"] else 2
        if roles[:size] not in (["user", "assistant"], ["user", "input", "assistant"]):
            raise InputError(
                f"{where}: after {at} messages come {', '.join(roles)}, which has no form as "
                "Alpaca: it knows turns of user and assistant. Set select.format: messages_jsonl "
                "and run cherry select; what is scored is kept."
            )
        if any(message.extra for message in messages[at : at + size]):
            raise InputError(
                f"{where}: a sample that calls tools has no form as Alpaca. Set select.format: "
                "messages_jsonl and run cherry select; what is scored is kept."
            )
        texts = [message.content for message in messages[at : at + size]]
        yield texts[0], texts[1] if size == 3 else "", texts[-1]
        at += size


def _key(key: Any) -> str:
    """Of an object: keys of a map may be anything."""
    plain = _plain(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _plain(value: Any) -> Any:
    """A value as JSON can say it: bytes in hex, times in ISO 8601, NaN and infinities as null."""
    if isinstance(value, dict):
        return {_key(key): _plain(item) for key, item in value.items()}
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
    return value if isinstance(value, str | int | None) else str(value)
